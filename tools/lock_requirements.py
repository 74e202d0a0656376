"""Writer of requirements-lock.txt and requirements-gpu-lock.txt: all packages of a release, with the sha256 of their wheels.

    python tools/lock_requirements.py

pip resolves requirements.txt as this machine would install it, requirements-gpu.txt as the public index alone has it, then
names for each pinned package the wheel of the public index and its hash, for this Python and platform; nothing is installed.
Builds with a local version ("2.13.0+cpu") are not on the public index: theirs is the hash of the wheel that this machine
would install, and PyTorch's own index is named beside it.
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
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def report(arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What pip would install, in its own words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(path), *arguments], env=environment, check=True)
        return json.loads(path.read_text())["install"]


def pin(package: dict[str, Any]) -> str:
    return f"{package['metadata']['name'].lower().replace('_', '-')}=={package['metadata']['version']}"


def hashes_of(packages: list[dict[str, Any]]) -> dict[str, str]:
    return {pin(each): each["download_info"]["archive_info"]["hashes"]["sha256"] for each in packages}


def public_environment() -> dict[str, str]:
    """pip asks the public index alone, whatever this machine is set to."""
    own = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL")
    return {
        **{name: value for name, value in os.environ.items() if name not in own},
        "PIP_CONFIG_FILE": os.devnull,
    }


def cpu_hashes() -> dict[str, str]:
    """Of requirements.txt, by pinned name."""
    resolved = report(["-r", str(ROOT / "requirements.txt")], dict(os.environ))
    local = hashes_of([each for each in resolved if "+" in pin(each)])
    public = sorted(pin(each) for each in resolved if "+" not in pin(each))
    return {**hashes_of(report(["--no-deps", "--only-binary=:all:", *public], public_environment())), **local}


def gpu_hashes() -> dict[str, str]:
    """Of requirements-gpu.txt, by pinned name; the public index has them all."""
    wanted = ["--only-binary=:all:", "-r", str(ROOT / "requirements-gpu.txt")]
    return hashes_of(report(wanted, public_environment()))


def write(source: str, target: str, hashes: dict[str, str], *options: str) -> None:
    lines = [
        f"# Made by tools/lock_requirements.py from {source}.",
        f"# Wheels of the public index for {platform.system()} {platform.machine()}, CPython "
        f"{sys.version_info.major}.{sys.version_info.minor}.",
        f"# pip install --no-deps --require-hashes -r {target}",
        *options,
        *(f"{each} --hash=sha256:{hashes[each]}" for each in sorted(hashes)),
    ]
    (ROOT / target).write_text("\n".join(lines) + "\n")


def main() -> None:
    write("requirements.txt", "requirements-lock.txt", cpu_hashes(), f"--extra-index-url {TORCH_INDEX}")
    write("requirements-gpu.txt", "requirements-gpu-lock.txt", gpu_hashes())


if __name__ == "__main__":
    main()
