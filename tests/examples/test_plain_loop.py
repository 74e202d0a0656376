"""The example of another trainer: short, and it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_any_optimizer_learns_the_embedded_data(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    for make in (lambda p: torch.optim.Adam(p, 3e-3), lambda p: torch.optim.RMSprop(p, 3e-3)):
        losses = example.train(tmp_path / "synthetic-books", 25, make)
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
