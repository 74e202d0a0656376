"""Steps whose sums do not depend on the order in which torch's threads come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from generative_recommenders.config.registry import LOSSES
from generative_recommenders.objectives.losses.catalogue import CatalogueLoss
from tiny_models import CE, EASY, SAMPLED, catalogue, contracted, loaded, settings, ten_users, training_step


class SumsByIndex(TorchDispatchMode):
    """Notes sums of several numbers into one place by index, which a CPU's threads make in any order
    (``index_put_(accumulate=True)``, an index's gradient)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_put" in str(func) and len(args) > 3 and args[3] and args[0].is_floating_point():
            places = [index for index in args[1] if index is not None and index.dtype == torch.int64]
            if places:
                every = torch.stack([index.flatten() for index in torch.broadcast_tensors(*places)])
                if every.unique(dim=1).shape[1] < every.shape[1]:
                    self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def of_loss(name: str) -> dict[str, Any]:
    make = LOSSES[name].make
    whole = isinstance(make, type) and issubclass(make, CatalogueLoss)
    return {**(CE if whole else {**SAMPLED, "sampling_strategy": "local"}), "loss_module": name}


STEPS = {**EASY, **{f"loss {name}": of_loss(name) for name in contracted(LOSSES)}}


@pytest.mark.parametrize("name", STEPS)
def test_no_gradient_is_summed_by_index(name: str) -> None:
    """Otherwise two runs of one seed, and a resumed one, would differ as soon as there are two threads."""
    chosen = settings(**{"item_embedding_dim": 16, "sasrec.ffn_hidden_dim": 16, **STEPS[name]})
    step, sums = training_step(chosen, catalogue()), SumsByIndex()
    with sums:
        step(loaded(ten_users()), 0)
    assert not sums.shapes
