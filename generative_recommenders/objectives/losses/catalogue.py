"""Losses over the whole catalogue: CE, CEWeighted, BCE, LogInCE, LogOutCE.

``forward(hidden, item_weight, positives, weights)`` never holds all logits (``ops/products/catalogue.py``) and forms
its gradients in the forward pass; ``terms`` is the same loss of logits that a caller holds. Everything is float32
(float64 stays), also under autocast; NaN logits give a NaN loss. Gradients of ``forward`` can be taken once, second
derivatives not. Temperature and L2 norm are applied to ``hidden`` and ``item_weight`` by the caller.

``positives`` are rows of ``item_weight``, -1 = none. A label of weight 0 adds no term, and yet is no negative
of its position: RePlay's reading of a partly masked position. Give -1 to drop a label entirely.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.config.fields import NonNegative, Positive, PositiveInt, Share
from generative_recommenders.config.registry import register_loss
from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.sampled import Terms, full_precision, log_in_terms, weighted
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.embedding import lookup_rows, range_of
from generative_recommenders.ops.products.catalogue import (
    LOGSUMEXP,
    SOFTPLUS_SUM,
    Shared,
    Statistic,
    catalogue_sum,
)
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp
from generative_recommenders.types import LossOutput

MEMORY_BYTES = 512 * 2**20
"""Default bound of the logits that are held at a time."""


class CatalogueLoss(nn.Module, ABC):
    """A loss of tokens against every item of the catalogue.

    memory_bytes: bound of the logits held at a time; speed, not numbers, depends on it.
    """

    statistic: Statistic = LOGSUMEXP
    excludes_labels = False

    def __init__(self, memory_bytes: PositiveInt = MEMORY_BYTES) -> None:
        super().__init__()
        self.memory_bytes = memory_bytes

    @abstractmethod
    def row_terms(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> Terms:
        """Loss of rows before it is summed, from positive logits ``[t, P]``, the row statistic ``[t]``, weights
        ``[t, P]``."""

    def terms(self, positive: Tensor, logits: Tensor, weights: Tensor, mask: Tensor, own: Tensor) -> Terms:
        """Loss of held logits ``[T, V]`` in full precision, before it is summed and without label smoothing.

        positive, weights: ``[T, P]``. mask, own: ``[T, V]`` bool, True = a negative of the row, a label of it
        (`is_label`).
        """
        counted = mask if self.excludes_labels else mask | own
        return self.row_terms(positive, masked_logsumexp(logits, counted), weights)

    def row_loss(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> LossOutput:
        """Summed loss of rows; arguments as of `row_terms`."""
        return weighted(*self.row_terms(positive, statistic, weights))

    def linear_term(
        self, positive: Tensor, labels: Tensor, weights: Tensor, mean_logit: Callable[[], Tensor]
    ) -> Tensor:
        """What is added to the sum and is linear in the logits: a scalar. ``mean_logit()`` is ``[T]``."""
        return positive.new_zeros(())

    def forward(
        self,
        hidden: Tensor,
        item_weight: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
        shard: RowShard | None = None,
    ) -> LossOutput:
        """Loss of T tokens over V items.

        hidden: ``[T, D]`` float. item_weight: ``[V, D]`` float.
        positives: ``[T]`` or ``[T, P]`` int64 rows of ``item_weight``, -1 = none.
        weights: like ``positives``, float or bool; 1 by default.
        shard: where ``item_weight`` holds this process's items alone; positives are of the whole catalogue. The loss is
        then that of the tokens of all processes: each computes the logits of its own items, and positive logits and row
        statistics are merged (Megatron's vocabulary-parallel loss, arXiv 1909.08053). Its number and weight stand on
        the main process alone; gradients flow on all, into the items those of all tokens.
        Raises ``UserError`` for positives out of range, an empty catalogue, or shapes that do not agree.
        """
        num_items = len(item_weight) if shard is None else shard.num_items
        labels, weights = labels_and_weights(positives, weights, len(hidden), num_items)
        with dispatch.autocast(hidden, None):
            hidden, item_weight = full_precision(hidden), full_precision(item_weight)
            weights, local, shared = weights.to(hidden.dtype), labels, None
            if shard is not None:
                hidden, labels, weights = (shard.joined(each) for each in (hidden, labels, weights))
                local, shared = labels - shard.before, Shared(shard.parts, shard.largest)

            def total_of(x: Tensor) -> Tensor:
                return x if shard is None else shard.total(x)

            # Each label's logit is computed where its item lies, and is 0 elsewhere.
            held = (labels >= 0) & (local >= 0) & (local < len(item_weight))
            # An index's gradient would be added up by torch's threads in whatever order they come.
            own_rows = lookup_rows(item_weight, local.clamp(0, len(item_weight) - 1))
            products = (hidden[:, None, :] * own_rows).sum(-1)
            positive = total_of(products * held)
            excluded = local.masked_fill(~held, -1) if self.excludes_labels else None
            total, weight, _ = catalogue_sum(
                hidden, item_weight, positive, weights, excluded, self.statistic,
                self.row_loss, self.memory_bytes, shared,
            )  # fmt: skip
            total = total + self.linear_term(
                positive, labels, weights, lambda: total_of(hidden @ (item_weight.sum(0) / num_items))
            )
            if shard is None:
                return LossOutput(total, weight)
            on_main = float(shard.collectives.is_main)
            # Counted on one process alone, so that the sum over processes is the number of a single one;
            # total - total is 0 and brings the gradient.
            return LossOutput(total.detach() * on_main + (total - total.detach()), weight * on_main)


@register_loss("CE", "CEWeighted", "SequenceLoss")
class CE(CatalogueLoss):
    """Softmax cross-entropy over the catalogue: ``w (ln sum_v exp(x_v) - x_p)`` for each positive p.

    ``weight`` is the sum of the weights. With several positives, each pair is a term of its own and the other
    positives stay in the denominator. ``CEWeighted`` is the same class: its sample weights are ``weights``;
    so is genrec's ``SequenceLoss``.

    label_smoothing: share of the target spread evenly over the catalogue, in [0, 1).
    """

    def __init__(self, label_smoothing: Share = 0.0, memory_bytes: PositiveInt = MEMORY_BYTES) -> None:
        super().__init__(memory_bytes)
        self.label_smoothing = label_smoothing

    def row_terms(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> Terms:
        return Terms(statistic[:, None] - positive, weights)

    def linear_term(
        self, positive: Tensor, labels: Tensor, weights: Tensor, mean_logit: Callable[[], Tensor]
    ) -> Tensor:
        if self.label_smoothing == 0:
            return positive.new_zeros(())
        return self.label_smoothing * weighted(positive - mean_logit()[:, None], weights).sum


@register_loss("BCE")
class BCE(CatalogueLoss):
    """Binary cross-entropy against all items: ``sum_v softplus(x_v) - sum of x over the distinct labels``.

    ``weight`` counts positions: a position weighs as much as its heaviest positive, and its labels are
    targets of 1 whatever their own weight, as in RePlay.
    """

    statistic = SOFTPLUS_SUM

    def terms(
        self, positive: Tensor, logits: Tensor, weights: Tensor, mask: Tensor, own: Tensor, *item_weights: Tensor | None
    ) -> Terms:  # fmt: skip
        """Over all items; item_weights: torch's ``weight`` and ``pos_weight`` ``[V]``."""
        weight, pos_weight = item_weights or (None, None)
        values = F.binary_cross_entropy_with_logits(
            logits, own.to(logits.dtype), weight, reduction="none", pos_weight=pos_weight
        )
        return Terms(values.sum(1), weights.amax(1))

    def row_terms(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> Terms:
        return Terms(statistic, weights.amax(1))

    def linear_term(
        self, positive: Tensor, labels: Tensor, weights: Tensor, mean_logit: Callable[[], Tensor]
    ) -> Tensor:
        same = labels[:, :, None] == labels[:, None, :]
        distinct = (labels >= 0) & ~same.tril(-1).any(2)  # a label that an earlier column holds counts once
        return -weighted(positive, weights.amax(1, keepdim=True) * distinct).sum


@register_loss("LogInCE")
class LogInCE(CatalogueLoss):
    """``-ln(S+ / (S+ + S-))`` a position, the sum over its positives inside the logarithm (arXiv 2205.04507).

    S+ is the sum of exp(x) over the positives of non-zero weight, S- over all items that are no label of the
    position. A position weighs as much as its heaviest positive.

    epsilon: added inside the logarithm (RePlay: 1e-6); 0 is the exact form.
    clamp_border: the logarithm is limited to ``[-clamp_border, clamp_border]`` (RePlay: 100).
    """

    excludes_labels = True

    def __init__(
        self,
        epsilon: NonNegative = 0.0,
        clamp_border: Positive = math.inf,
        memory_bytes: PositiveInt = MEMORY_BYTES,
    ) -> None:
        super().__init__(memory_bytes)
        self.epsilon = epsilon
        self.clamp_border = clamp_border

    def row_terms(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> Terms:
        return log_in_terms(positive, weights, statistic, self.epsilon, self.clamp_border)


@register_loss("LogOutCE")
class LogOutCE(CatalogueLoss):
    """``-ln(exp(x_p) / (exp(x_p) + S-))`` for each positive p, summed outside the logarithm.

    S- is the sum of exp(x) over all items that are no label of the position. ``weight`` is the sum of the
    weights.
    """

    excludes_labels = True

    def row_terms(self, positive: Tensor, statistic: Tensor, weights: Tensor) -> Terms:
        # ln(exp(x_p) + S-) by its logarithms: exp of a large logit overflows.
        return Terms(torch.logaddexp(positive, statistic[:, None]) - positive, weights)


def is_label(labels: Tensor, num_items: int) -> Tensor:
    """``[T, V]`` bool: the items that are among a row's labels ``[T, P]``, -1 = none."""
    marked = torch.zeros(len(labels), num_items + 1, dtype=torch.bool, device=labels.device)
    return marked.scatter_(1, labels + 1, True)[:, 1:]


def labels_and_weights(
    positives: Tensor, weights: Tensor | None, num_tokens: int, num_items: int
) -> tuple[Tensor, Tensor]:
    """Labels ``[T, P]`` and their weights, 0 where there is no label."""
    if len(positives) != num_tokens or not num_items:
        raise UserError(
            f"{len(positives)} positives for {num_tokens} tokens over {num_items} items: give one row for each token, "
            "and at least one item"
        )
    if weights is None:
        weights = torch.ones_like(positives, dtype=torch.float32)
    if weights.shape != positives.shape:
        raise UserError(f"weights {tuple(weights.shape)} and positives {tuple(positives.shape)} must have one shape")
    reach = range_of(positives)
    if reach is not None and (reach[0] < -1 or reach[1] >= num_items):
        raise UserError(
            f"positives reach from {reach[0]} to {reach[1]}: they must be rows 0..{num_items - 1}, or -1 for none"
        )
    labels = positives[:, None] if positives.dim() == 1 else positives
    return labels, weights.reshape(labels.shape) * (labels >= 0)
