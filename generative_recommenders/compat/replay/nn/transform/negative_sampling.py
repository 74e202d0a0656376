"""Negatives drawn as a batch transform: uniform or weighted over ids 0..cardinality-1, or by class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.transform.batch import TensorBatch, require
from generative_recommenders.errors import UserError

__all__ = ["MultiClassNegativeSamplingTransform", "UniformNegativeSamplingTransform"]

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


class UniformNegativeSamplingTransform(nn.Module):
    """Adds ``num_negative_samples`` distinct ids ``[R]`` int64 of 0..cardinality-1, one vector for the batch.

    sample_distribution: ``[cardinality]`` weights, equal if None; items of weight 0 are never drawn.
    generator: on the weights' device; None is torch's default one. Draws are not compared with the positives: losses mask
        collisions.
    Raises ``UserError`` for weights of another size, negative ones, or a pool that is too small.
    """

    weights: Tensor
    pool: Tensor

    def __init__(
        self,
        cardinality: int,
        num_negative_samples: int,
        *,
        out_feature_name: str = "negative_labels",
        sample_distribution: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weights = torch.ones(cardinality) if sample_distribution is None else sample_distribution
        if weights.shape != (cardinality,):
            raise UserError(
                f"UniformNegativeSamplingTransform: weights have shape {tuple(weights.shape)}, expected one per item: "
                f"({cardinality},)"
            )
        weights = check_weights(weights, num_negative_samples, "UniformNegativeSamplingTransform")
        pool = weights.nonzero()[:, 0]
        self.register_buffer("weights", weights[pool], persistent=False)
        self.register_buffer("pool", pool, persistent=False)
        self.num_negatives = num_negative_samples
        self.generator = generator
        self.out = out_feature_name

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        drawn = torch.multinomial(self.weights, self.num_negatives, generator=self.generator)
        return {**batch, self.out: self.pool[drawn]}


class MultiClassNegativeSamplingTransform(nn.Module):
    """Adds ``[B, num_negative_samples]`` distinct ids of 0..cardinality-1, drawn for the class that a row's selector names.

    sample_mask: ``[classes, cardinality]`` weights or indicators. One set of ids is drawn per class and batch; row b receives
    that of class ``batch[negative_selector_name][b]``. Raises ``UserError`` for a class with fewer items than negatives or a
    selector outside of the classes.
    """

    class_weights: Tensor

    def __init__(
        self,
        num_negative_samples: int,
        sample_mask: Tensor,
        *,
        negative_selector_name: str = "negative_selector",
        out_feature_name: str = "negative_labels",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if sample_mask.dim() != 2 or not len(sample_mask):
            wrong = "has no classes" if sample_mask.dim() == 2 else f"is {list(sample_mask.shape)}"
            raise UserError(
                f"MultiClassNegativeSamplingTransform: sample_mask {wrong}: give weights [classes, items]"
            )
        weights = check_weights(sample_mask, num_negative_samples, "MultiClassNegativeSamplingTransform")
        self.register_buffer("class_weights", weights, persistent=False)
        self.num_negatives = num_negative_samples
        self.selector = negative_selector_name
        self.generator = generator
        self.out = out_feature_name

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selector = require(batch, self.selector, "MultiClassNegativeSamplingTransform")
        classes = len(self.class_weights)
        if selector.numel() and not 0 <= int(selector.min()) <= int(selector.max()) < classes:
            raise UserError(
                f"MultiClassNegativeSamplingTransform: '{self.selector}' must be between 0 and {classes - 1}"
            )
        drawn = torch.multinomial(self.class_weights, self.num_negatives, generator=self.generator)
        return {**batch, self.out: drawn[selector]}
