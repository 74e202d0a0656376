"""Writes requirements-lock.txt: every package that requirements.txt brings, with the sha256 of its public wheel.

    python tools/lock_requirements.py

pip resolves requirements.txt as this machine would install it, then names for each pinned package the wheel of the
public index and its hash, for this Python and platform; nothing is installed. Builds with a local version
("2.13.0+cpu") are not on the public index: they are listed as comments.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def report(arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What pip would install, in its own words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(path), *arguments], env=environment, check=True)
        return json.loads(path.read_text())["install"]


def pin(package: dict[str, Any]) -> str:
    return f"{package['metadata']['name'].lower().replace('_', '-')}=={package['metadata']['version']}"


def main() -> None:
    resolved = sorted(map(pin, report(["-r", str(ROOT / "requirements.txt")], dict(os.environ))))
    public = [each for each in resolved if "+" not in each]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    found = report(["--no-deps", "--only-binary=:all:", *public], environment)
    hashes = {pin(each): each["download_info"]["archive_info"]["hashes"]["sha256"] for each in found}
    lines = [
        "# Made by tools/lock_requirements.py from requirements.txt.",
        f"# Wheels of the public index for {platform.system()} {platform.machine()}, CPython "
        f"{sys.version_info.major}.{sys.version_info.minor}.",
        "# Install the packages named in comments first, then: pip install --no-deps --require-hashes -r "
        "requirements-lock.txt",
        *(
            f"# {each}: not on the public index, no hash of it here; see SECURITY.md"
            for each in resolved
            if "+" in each
        ),
        *(f"{each} --hash=sha256:{hashes[each]}" for each in public),
    ]
    (ROOT / "requirements-lock.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
