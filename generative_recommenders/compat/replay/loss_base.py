"""Base class of RePlay's losses: arguments, the callback that scores, the choice of positions, the reduction.

A loss gives its terms, one a target or one a position; how they are summed is said here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from generative_recommenders.errors import UserError

LogitsCallback = Callable[..., Tensor]

REDUCTIONS = ("mean", "sum", "none")
ITEM_WEIGHTS = ("weight", "pos_weight")


class Positions(NamedTuple):
    """The M positions with at least one target that counts."""

    chosen: Tensor  # [B, L] bool
    hidden: Tensor  # [M, D]
    labels: Tensor  # [M, P], -1 where ignored
    counts: Tensor  # [M, P] bool


class Terms(NamedTuple):
    """A loss before its reduction: ``[M]``, one a position, or ``[M, P]``, one a target."""

    values: Tensor
    weights: Tensor  # the mean divides by their sum


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
        """The result: a scalar, or the terms at their places. Targets that do not count are left out."""
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


def softmax_terms(
    positive: Tensor,
    negative: Tensor,
    kept: Tensor,
    label_smoothing: float,
    positive_weights: Tensor,
    negative_weights: Tensor | None = None,
) -> Terms:
    """``-ln softmax`` of each positive ``[M, P]`` among itself and the kept negatives ``[M, R]``.

    Weights by item as in torch's cross-entropy: of the label for its own term, of every class for its share
    of the smoothing, which is spread over the positive and the kept negatives.
    """
    log_total = torch.logaddexp(positive, _masked(negative, kept).logsumexp(1)[:, None])
    own = positive_weights * (log_total - positive)
    if label_smoothing == 0:
        return Terms(own, positive_weights)
    shares = kept.to(negative.dtype) if negative_weights is None else negative_weights * kept
    scored = (shares * negative.where(kept, 0.0)).sum(1, keepdim=True)
    others = log_total * shares.sum(1, keepdim=True) - scored
    smooth = (own + others) / (1 + kept.sum(1, keepdim=True))
    return Terms(torch.lerp(own, smooth, label_smoothing), positive_weights)


def log_in_ratio(positive: Tensor, counts: Tensor, negative: Tensor, kept: Tensor) -> Tensor:
    """``ln(S+ / (S+ + S-))`` a position, ``[M]``: sums of exp over what counts ``[M, P]`` and is kept ``[M,
    R]``."""
    log_positive = _masked(positive, counts).logsumexp(1)
    return log_positive - torch.logaddexp(log_positive, _masked(negative, kept).logsumexp(1))


def _masked(scores: Tensor, kept: Tensor) -> Tensor:
    return scores.masked_fill(~kept, -torch.inf)
