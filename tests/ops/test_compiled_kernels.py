"""The kernels as they are compiled for cards: each must fit into the registers and the shared memory of all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {75: 64 << 10, 80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of a program at most, by compute capability."""
SPILLED = 1024
"""Bytes of a thread's registers that may go to memory: a kernel that does not fit spills thousands."""


EVERY = [
    *(
        f"{part}:{width}:{how}"
        for part in ("attention", "catalogue")
        for width in (25, 64, 128)
        for how in ("ieee", "tf32")
    ),
    *(f"attention:{width}:bf16" for width in (25, 64, 128)),
    *(f"rows:{width}:ieee" for width in (64, 256, 1024)),
]
WIDEST = ["attention:256:ieee", "attention:256:tf32"]


@pytest.mark.parametrize(
    ("capability", "launches"),
    [
        (89, ["attention:25:ieee", "attention:128:tf32", "catalogue:64:ieee", "rows:64:ieee"]),
        (89, ["attention:64:tf32", "attention:256:tf32", "catalogue:128:tf32"]),
        pytest.param(75, EVERY, marks=pytest.mark.slow),
        *(pytest.param(capability, EVERY + WIDEST, marks=pytest.mark.slow) for capability in (80, 89, 90, 120)),
    ],
)
def test_a_program_fits_into_a_card(capability: int, launches: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled_kernels.py")), str(capability), *launches],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.split()[0] for name in found} == set(launches)
    too_large = {
        name: taken for name, taken in found.items() if taken["shared"] > SHARED[capability] or taken["stack"] > SPILLED
    }
    assert not too_large
