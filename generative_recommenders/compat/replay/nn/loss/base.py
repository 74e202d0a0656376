"""Base class of RePlay's losses: arguments, the callback that scores, the choice of positions, the reduction.

A loss gives its terms, one a target or one a position; how they are summed is said here, once.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.compat.replay.nn.protocols import LogitsCallback
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.sampled import Terms

REDUCTIONS = ("mean", "sum", "none")
ITEM_WEIGHTS = ("weight", "pos_weight")


class Positions(NamedTuple):
    """The M positions with at least one target that counts."""

    chosen: Tensor  # [B, L] bool
    hidden: Tensor  # [M, D]
    labels: Tensor  # [M, P], -1 where ignored
    counts: Tensor  # [M, P] bool

    def excluding(self, item: int, num_items: int) -> tuple[Tensor, Tensor]:
        """Labels and their weights with ``item`` beside them, at weight 0: no target, and no negative of any position."""
        weights = self.counts.float()
        if not 0 <= item < num_items:
            return self.labels, weights
        return F.pad(self.labels, (0, 1), value=item), F.pad(weights, (0, 1))


class ReplayLoss(nn.Module):
    """Arguments, scoring by callback, choice of positions, reduction.

    ignore_index, padding_idx: labels that are no labels at all.
    reduction: "mean", "sum", or "none": ``[B, L]`` or ``[B, L, P]`` with 0 where nothing counts.
    Of the further arguments of torch's losses, those in ``takes`` act. Any other name is a ``UserError``.
    """

    takes: ClassVar[tuple[str, ...]] = ("reduction", "ignore_index", "padding_idx")
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        for name in (name for name in arguments if name not in self.takes):
            raise self.refusal(f"the argument {name!r} means nothing here; known: {', '.join(self.takes)}")
        self.ignore_index: int = arguments.get("ignore_index", -100)
        self.padding_idx: int | None = arguments.get("padding_idx")
        self.reduction: str = arguments.get("reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise self.refusal(f"reduction is {self.reduction!r}: give one of {', '.join(REDUCTIONS)}")
        self.label_smoothing: float = arguments.get("label_smoothing", 0.0)
        if not isinstance(self.label_smoothing, (int, float)) or not 0 <= self.label_smoothing <= 1:
            raise self.refusal(f"label_smoothing is {self.label_smoothing!r}: give a share in [0, 1]")
        for name in ITEM_WEIGHTS:
            self.register_buffer(name, self._item_weights(name, arguments.get(name)))
        self._logits_callback: LogitsCallback | None = None

    def _item_weights(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is not None and (not isinstance(value, Tensor) or value.dim() != 1):
            raise self.refusal(f"{name} must be a tensor [V], one number an item")
        return value

    def refusal(self, message: str) -> UserError:
        """An error that names the loss."""
        return UserError(f"{type(self).__name__}: {message}")

    @property
    def logits_callback(self) -> LogitsCallback:
        """What turns hidden states, and item ids if given, into logits; ``UserError`` until it is set."""
        if self._logits_callback is None:
            raise self.refusal("set logits_callback before the first call")
        return self._logits_callback

    @logits_callback.setter
    def logits_callback(self, callback: LogitsCallback | None) -> None:
        self._logits_callback = callback

    def positions(self, hidden: Tensor, labels: Tensor, target_padding_mask: Tensor) -> Positions:
        """The positions that have a target; ``UserError`` where none has."""
        ignored = labels == self.ignore_index
        if self.padding_idx is not None:
            ignored = ignored | (labels == self.padding_idx)
        counts = target_padding_mask & ~ignored
        chosen = counts.any(-1)
        if not chosen.any():
            raise self.refusal("every target is masked, there is nothing to learn from")
        return Positions(chosen, hidden[chosen], labels.masked_fill(ignored, -1)[chosen], counts[chosen])

    def check_item_weights(self, num_items: int) -> None:
        """``UserError`` where item weights are not ``[num_items]``."""
        for name in ITEM_WEIGHTS:
            given = getattr(self, name)
            if given is not None and len(given) != num_items:
                raise self.refusal(f"{name} has {len(given)} numbers for {num_items} items")

    def reduced(self, terms: Terms, positions: Positions) -> Tensor:
        """The result: a scalar, or the terms at their places. Targets that do not count are left out.

        terms: the values are multiplied by their weights already; the mean divides by the sum of the weights.
        """
        values, weights = terms
        if values.dim() == 2:
            values = values.where(positions.counts, 0.0)
            weights = weights.where(positions.counts, 0.0)
        if self.reduction == "none":
            places = values.new_zeros((*positions.chosen.shape, *values.shape[1:]))
            return places.index_put((positions.chosen,), values)
        return values.sum() if self.reduction == "sum" else values.sum() / weights.sum()


CROSS_ENTROPY = (*ReplayLoss.takes, "weight", "label_smoothing")
"""What a loss takes whose ``weight [V]`` and ``label_smoothing`` are those of torch's cross-entropy."""


def weights_of(weight: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Each id's weight, 1 without weights; an id below 0 (no item, left out of every sum) has item 0's."""
    if weight is None:
        return torch.ones(ids.shape, dtype=dtype, device=ids.device)
    return weight[ids.clamp(min=0)].to(dtype)


def weighted_terms(
    own: Tensor,
    own_weights: Tensor,
    label_smoothing: float,
    positive: Tensor,
    negative: Tensor,
    kept: Tensor,
    negative_weights: Tensor | None,
) -> Terms:
    """torch's weights by item and label smoothing on ``own [M, P]``, the ``-ln softmax`` of each positive ``[M, P]``.

    As in torch's cross-entropy: the label's weight for its own term, every class's for its share of the smoothing, which is
    spread over the positive and the kept negatives ``[M, R]`` (negative_weights broadcast to them, 1 by default).
    """
    weighted = own_weights * own
    if label_smoothing == 0:
        return Terms(weighted, own_weights)
    log_total = own + positive
    shares = kept.to(negative.dtype) if negative_weights is None else negative_weights * kept
    others = log_total * shares.sum(1, keepdim=True) - (shares * negative.where(kept, 0.0)).sum(
        1, keepdim=True
    )
    smooth = (weighted + others) / (1 + kept.sum(1, keepdim=True))
    return Terms(torch.lerp(weighted, smooth, label_smoothing), own_weights)
