"""Negatives drawn as a batch transform: uniform or weighted over the catalogue, or by class.

Ids here are the package's own, 1..V; 0, the padding, is never drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from generative_recommenders.data.batch_transforms import TensorBatch, require
from generative_recommenders.errors import UserError

MULTINOMIAL_LIMIT = 2**24
"""torch.multinomial takes at most this many categories."""


def check_weights(weights: Tensor, num_negatives: int, who: str) -> Tensor:
    """Weights ``[..., V]`` as float; ``UserError`` where a row has fewer than ``num_negatives`` items."""
    weights = weights.float()
    if num_negatives < 1:
        raise UserError(f"{who}: the number of negatives must be at least 1, not {num_negatives}")
    if weights.shape[-1] > MULTINOMIAL_LIMIT:
        raise UserError(
            f"{who}: {weights.shape[-1]} items are too many to weigh; use the objectives' samplers instead"
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise UserError(f"{who}: weights must be finite and not negative")
    available = int((weights > 0).sum(-1).min())
    if available < num_negatives:
        raise UserError(
            f"{who}: {num_negatives} distinct negatives asked of a pool of {available} items; ask for fewer"
        )
    return weights


class UniformNegativeSampling(nn.Module):
    """Adds ``out [R]`` int64: ``num_negatives`` distinct item ids, one set for the whole batch.

    num_items: V. weights: ``[V]``, weight of ids 1..V, equal if None; items of weight 0 are never drawn.
    generator: on the weights' device; None is torch's default one. Draws are not compared with the
    positives: losses mask collisions. Raises ``UserError`` for weights of another size, negative ones, or a
    pool that is too small.
    """

    weights: Tensor
    pool: Tensor

    def __init__(
        self,
        num_items: int,
        num_negatives: int,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
        out: str = "negative_ids",
    ) -> None:
        super().__init__()
        weights = torch.ones(num_items) if weights is None else weights
        if weights.shape != (num_items,):
            shape = tuple(weights.shape)
            raise UserError(
                f"UniformNegativeSampling: weights have shape {shape}, expected one per item: ({num_items},)"
            )
        weights = check_weights(weights, num_negatives, "UniformNegativeSampling")
        pool = weights.nonzero()[:, 0]
        self.register_buffer("weights", weights[pool], persistent=False)
        self.register_buffer("pool", pool + 1, persistent=False)
        self.num_negatives = num_negatives
        self.generator = generator
        self.out = out

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        drawn = torch.multinomial(self.weights, self.num_negatives, generator=self.generator)
        return {**batch, self.out: self.pool[drawn]}


class MultiClassNegativeSampling(nn.Module):
    """Adds ``out [B, R]`` int64: distinct negatives of the class that each row's selector names.

    class_weights: ``[C, V]``, weight (or 0/1) of item id i + 1 in class c at ``[c, i]``. One set of R ids
    is drawn per class and batch; row b receives the set of class ``batch[selector][b]``. Raises
    ``UserError`` for a class with fewer than ``num_negatives`` items or a selector outside 0..C-1.
    """

    class_weights: Tensor

    def __init__(
        self,
        num_negatives: int,
        class_weights: Tensor,
        selector: str = "negative_selector",
        generator: torch.Generator | None = None,
        out: str = "negative_ids",
    ) -> None:
        super().__init__()
        if class_weights.dim() != 2 or not len(class_weights):
            raise UserError(
                f"MultiClassNegativeSampling: weights must be [classes, items], not {list(class_weights.shape)}"
            )
        weights = check_weights(class_weights, num_negatives, "MultiClassNegativeSampling")
        self.register_buffer("class_weights", weights, persistent=False)
        self.num_negatives = num_negatives
        self.selector = selector
        self.generator = generator
        self.out = out

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selector = require(batch, self.selector, "MultiClassNegativeSampling")
        classes = len(self.class_weights)
        if selector.numel() and not 0 <= int(selector.min()) <= int(selector.max()) < classes:
            raise UserError(
                f"MultiClassNegativeSampling: '{self.selector}' must be between 0 and {classes - 1}"
            )
        drawn = torch.multinomial(self.class_weights, self.num_negatives, generator=self.generator)
        return {**batch, self.out: drawn[selector] + 1}
