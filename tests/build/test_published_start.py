"""The loss that training of a published mixture of logits begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.gin import load_settings
from tiny_models import loaded

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "ml-1m"
FILMS = 3883
"""Of the file of films, rated or not."""


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_the_first_loss_of_a_mixture_is_near_that_of_chance(encoder: str) -> None:
    """With 128 negatives chance is ln 129 = 4.86; user tables of deviation 1 would begin near 11.7."""
    (path,) = CONFIGS.glob(f"{encoder}-mol-*-final.gin")
    torch.manual_seed(0)
    items = Catalogue(FILMS, True, True, torch.ones(FILMS, dtype=torch.int64))
    task = build_task(load_settings([path]), items)
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
