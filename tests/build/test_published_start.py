"""What training of the published configurations begins with: deviations of weights, and the first loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.gin import load_settings
from tiny_models import loaded

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ml-1m"
FILMS = 3883
"""Of the file of films, rated or not."""


def begun(name: str):
    """The training task of a configuration of ML-1M's shape."""
    (path,) = CONFIGS.glob(f"{name}-final.gin")
    chosen = load_settings([path])[0]
    torch.manual_seed(0)
    return build_task(chosen, Catalogue(FILMS, True, True, torch.ones(FILMS, dtype=torch.int64)))


@pytest.mark.parametrize("name", ["hstu-sampled-softmax-n128", "hstu-mol-*-rails"])
def test_positions_of_hstu_begin_by_xavier(name: str) -> None:
    """Normal(0, 2 / (211 + 50)), drawn when the whole model is made; nothing is cut."""
    position, deviation = begun(name).model.sequence.preprocessor.position, math.sqrt(2 / 261)
    assert position.shape == (211, 50) and deviation == pytest.approx(0.088, abs=6e-4)
    assert position.std().item() == pytest.approx(deviation, rel=0.03)
    assert (position.abs() < deviation).float().mean().item() == pytest.approx(0.683, abs=0.02)
    assert position.abs().max() > 3 * deviation


@pytest.mark.parametrize("name", ["sasrec-sampled-softmax-n128", "sasrec-mol-*-rails"])
def test_positions_of_sasrec_begin_truncated(name: str) -> None:
    """A normal of deviation 1 / sqrt(50), cut at twice that, which leaves 0.88 of it."""
    position, deviation = begun(name).model.sequence.preprocessor.position, 1 / math.sqrt(50)
    assert position.abs().max() <= 2 * deviation
    assert position.std().item() == pytest.approx(0.88 * deviation, rel=0.03)


@pytest.mark.parametrize("name", ["hstu-mol-*-rails", "sasrec-mol-*-rails"])
def test_the_first_loss_of_a_mixture_is_near_that_of_chance(name: str) -> None:
    """With 128 negatives chance is ln 129 = 4.86; user tables of deviation 1 would begin near 11.7."""
    task = begun(name)
    generator = torch.Generator().manual_seed(0)
    columns = {
        "user_ids": torch.arange(1, 5),
        "lengths": torch.full((4,), 60),
        "item_ids": torch.randint(1, FILMS + 1, (4, 60), generator=generator),
        "ratings": torch.randint(1, 6, (4, 60), generator=generator),
        "timestamps": torch.arange(60).expand(4, 60) * 3600,
    }
    with torch.no_grad():
        output = task.loss(loaded(columns), 0)
    assert 4.9 < float(output.sum / output.weight) < 5.8
