"""What benchmarks share: the place of the package, arguments, and records that say when, at which commit and on what
they were measured. Torch is not imported here, since some benchmarks measure what its import takes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's package, installed or not

_LOAD = os.getloadavg()[0]
"""Before the work: on a busy machine the times are those of others, too."""


def parser_of(description: str | None, **integers: int) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is; integers: options by name, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in integers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def stamp() -> dict[str, Any]:
    """When, where and of which code. commit: with "-dirty" where the checkout has other changes; None without git, or
    outside a checkout."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    with contextlib.suppress(FileNotFoundError):  # no git
        commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or None,
        "torch": version("torch"),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(_LOAD, 2),
    }


def resident_bytes(process: int | str = "self") -> int:
    """Resident memory of a process, by its number, as it is now."""
    pages = Path(f"/proc/{process}/statm")
    if not pages.exists():
        raise SystemExit("no /proc/PID/statm here: this benchmark reads memory on Linux only")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def finish(result: Mapping[str, Any], output: Path | None = None) -> None:
    """Prints the record as the last line, and writes it to a file where one is asked for."""
    record = {**stamp(), **result}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(json.dumps(record, default=str))
