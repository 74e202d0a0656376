"""The example of another trainer: short, and it learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_any_optimizer_learns_the_embedded_data(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    train = runpy.run_path(str(EXAMPLE))["train"]
    torch.manual_seed(0)
    for make in (lambda p: torch.optim.Adam(p, 3e-3), lambda p: torch.optim.RMSprop(p, 3e-3)):
        losses = train(tmp_path / "synthetic-books", 25, make)
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
