"""Records of benchmarks: a JSON object that says when, at which commit and on what it was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LOAD = os.getloadavg()[0]
"""Before the work: of a busy machine the times are those of others, too."""


def stamp() -> dict[str, Any]:
    """When, where and of which code. commit: with "-dirty" where the checkout has other changes; None outside git."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
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
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
