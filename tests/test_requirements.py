"""Pinned requirements and locks that cover every extra."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINNED = {
    "lightning": "requirements-extras.txt",
    "export": "requirements-extras.txt",
    "serve": "requirements-extras.txt",
    "search": "requirements-extras.txt",
    "kernels": "requirements-extras.txt",
    "spark": "requirements-spark.txt",
    "gpu": "requirements-gpu.txt",
    "torchrec": "requirements-torchrec.txt",
}
TOOLS = ("dev", "docs")
"""Extras of those who work on the program: nothing that a user runs needs them."""
LOCKED = {
    "requirements-gpu.txt": "requirements-gpu-lock.txt",
    "requirements-torchrec.txt": "requirements-torchrec-lock.txt",
}


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / file).read_text(), re.MULTILINE))


def extras() -> dict[str, list[str]]:
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    found = re.findall(r"^(\w+) = \[(.*)\]$", text, re.MULTILINE)
    return {name: re.findall(r'"([\w.-]+)', packages) for name, packages in found if name not in TOOLS}


@pytest.mark.parametrize("extra", extras())
def test_an_extra_is_pinned_and_locked(extra: str) -> None:
    pinned = pins(PINNED[extra])
    locked = pins(LOCKED.get(PINNED[extra], "requirements-extras-lock.txt"))
    for package in extras()[extra]:
        assert locked[package] == pinned[package]


@pytest.mark.parametrize("lock", ["requirements-lock.txt", "requirements-extras-lock.txt"])
def test_the_locks_hold_the_pinned_packages(lock: str) -> None:
    locked = pins(lock)
    for package, version in pins("requirements.txt").items():
        assert locked[package].removesuffix("+cpu") == version
