"""Base classes of RePlay's losses: arguments, scores by callback, choice of positions, reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.protocols import LogitsCallback
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses import catalogue, sampled
from generative_recommenders.objectives.losses.catalogue import is_label
from generative_recommenders.objectives.losses.sampled import Terms, full_precision
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp

REDUCTIONS = ("mean", "sum", "none")


class Scores(NamedTuple):
    """The scores of the M positions that have a target: P targets against K negatives, or against the V items."""

    positive: Tensor  # [M, P]
    negative: Tensor  # [M, K]
    labels: Tensor  # [M, P]: items of the targets, -1 for none
    counts: Tensor  # [M, P] bool: the target counts
    items: Tensor  # [M, K] or [K]: items of the negatives
    kept: Tensor  # [M, K] bool: the negative competes
    collided: Tensor  # [M, K] bool: the negative is a label of its position


class ReplayLoss(nn.Module, ABC):
    """Arguments, scoring by callback, choice of positions, reduction.

    ignore_index, padding_idx: labels that are no labels at all.
    reduction: "mean", "sum", or "none": ``[B, L]`` or ``[B, L, P]`` with 0 where nothing counts.
    Of the further arguments of torch's losses, those in ``takes`` act. Any other name is a ``UserError``.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        known = ("reduction", "ignore_index", "padding_idx", *self.takes)
        for name in (name for name in arguments if name not in known):
            raise self.error(f"the argument {name!r} means nothing here; known: {', '.join(known)}")
        self.ignore_index: int = arguments.get("ignore_index", -100)
        self.padding_idx: int | None = arguments.get("padding_idx")
        self.reduction: str = arguments.get("reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise self.error(f"reduction is {self.reduction!r}: give one of {', '.join(REDUCTIONS)}")
        self.label_smoothing: float = arguments.get("label_smoothing", 0.0)
        if not isinstance(self.label_smoothing, (int, float)) or not 0 <= self.label_smoothing <= 1:
            raise self.error(f"label_smoothing is {self.label_smoothing!r}: give a share in [0, 1]")
        for name in ("weight", "pos_weight"):
            value = arguments.get(name)
            if value is not None and (not isinstance(value, Tensor) or value.dim() != 1):
                raise self.error(f"{name} must be a tensor [V], one number an item")
            self.register_buffer(name, value)
        self._logits_callback: LogitsCallback | None = None

    def error(self, message: str) -> UserError:
        """An error that names the loss."""
        return UserError(f"{type(self).__name__}: {message}")

    @property
    def logits_callback(self) -> LogitsCallback:
        """What turns hidden states, and item ids if given, into logits; ``UserError`` until it is set."""
        if self._logits_callback is None:
            raise self.error("set logits_callback before the first call")
        return self._logits_callback

    @logits_callback.setter
    def logits_callback(self, callback: LogitsCallback | None) -> None:
        self._logits_callback = callback

    def targets(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The positions with a target, bool ``[B, L]``, their labels ``[M, P]`` (-1 where ignored) and which of them count."""
        ignored = labels == self.ignore_index
        if self.padding_idx is not None:
            ignored = ignored | (labels == self.padding_idx)
        counts = mask & ~ignored
        chosen = counts.any(-1)
        if not chosen.any():
            raise self.error("every target is masked, there is nothing to learn from")
        return chosen, labels.masked_fill(ignored, -1)[chosen], counts[chosen]

    @abstractmethod
    def own_terms(self, scores: Scores) -> Terms:
        """The loss of training before it is summed: values and weights of positions ``[M]`` or targets ``[M, P]``."""

    def terms(self, scores: Scores) -> Terms:
        """The same under the arguments of this loss."""
        return self.own_terms(scores)

    def reduced(self, terms: Terms, chosen: Tensor, counts: Tensor) -> Tensor:
        """A scalar, or the terms at their places. Targets that do not count are left out.

        terms: the values are multiplied by their weights already; the mean divides by the sum of the weights.
        """
        values, weights = terms
        if values.dim() == 2:
            values, weights = values.where(counts, 0.0), weights.where(counts, 0.0)
        if self.reduction == "none":
            places = values.new_zeros((*chosen.shape, *values.shape[1:]))
            return places.index_put((chosen,), values)
        return values.sum() if self.reduction == "sum" else values.sum() / weights.sum()


class CatalogueLoss(ReplayLoss):
    """A loss against all items. cardinality: items of the catalogue, None for as many as there are logits."""

    core: catalogue.CatalogueLoss

    def __init__(
        self, cardinality: int | None = None, negative_labels_ignore_index: int = -100, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.cardinality = cardinality
        self.negative_labels_ignore_index = negative_labels_ignore_index

    def forward(
        self, model_embeddings: Tensor, positive_labels: Tensor, target_padding_mask: Tensor
    ) -> Tensor:
        """The loss, see ``replay.nn.loss``."""
        chosen, labels, counts = self.targets(positive_labels, target_padding_mask)
        terms = self.terms(self.scores(model_embeddings[chosen], labels, counts))
        return self.reduced(terms, chosen, counts)

    def scores(self, hidden: Tensor, labels: Tensor, counts: Tensor) -> Scores:
        """The scores of hidden states ``[M, D]`` with every item."""
        logits = full_precision(self.logits_callback(hidden)[:, : self.cardinality])
        num_items = logits.shape[1]
        for name, given in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if given is not None and len(given) != num_items:
                raise self.error(f"{name} has {len(given)} numbers for {num_items} items")
        # A label that does not count may be anything, as padding often is the number of items.
        outside = (labels < 0) | (labels >= num_items)
        if (outside & counts).any():
            raise self.error(f"a positive label lies outside of 0..{num_items - 1}")
        labels = labels.masked_fill(outside, -1)
        collided = is_label(labels, num_items)
        items = torch.arange(num_items, device=logits.device)
        kept = ~collided & (items != self.negative_labels_ignore_index)
        positive = logits.gather(1, labels.clamp(min=0))
        return Scores(positive, logits, labels, counts, items, kept, collided)

    def own_terms(self, scores: Scores) -> Terms:
        if self.core.excludes_labels:
            statistic = masked_logsumexp(scores.negative, scores.kept)
        else:
            statistic = scores.negative.logsumexp(1)
        return self.core.row_terms(scores.positive, statistic, scores.counts.to(scores.positive.dtype))


class SampledLoss(ReplayLoss):
    """A loss against sampled negatives.

    Negatives ``[K]`` are one product with all positions, ``[B, K]`` one product a row, ``[B, L, K]`` one a position. A model of
    this package scores all rows at once; any other callback is called once a row.

    negative_labels_ignore_index: a negative that does not count.
    """

    core: sampled.SampledLoss

    def __init__(self, negative_labels_ignore_index: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.negative_labels_ignore_index = negative_labels_ignore_index

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        negative_labels: Tensor,
        target_padding_mask: Tensor,
    ) -> Tensor:
        """The loss, see ``replay.nn.loss``."""
        chosen, labels, counts = self.targets(positive_labels, target_padding_mask)
        hidden = model_embeddings[chosen]
        if negative_labels.dim() == 1:
            own = negative_labels.expand(len(hidden), -1)
        elif negative_labels.dim() == 2 and len(negative_labels) == len(chosen):
            own = negative_labels[chosen.nonzero()[:, 0]]
        elif negative_labels.dim() == 3 and negative_labels.shape[:2] == chosen.shape:
            own = negative_labels[chosen]
        else:
            given, wanted = tuple(negative_labels.shape), tuple(chosen.shape)
            raise self.error(f"negative labels {given}: give [K], [B, K] or [B, L, K] for {wanted}")
        ignored = own == self.negative_labels_ignore_index
        collided = (own[:, :, None] == labels[:, None, :]).any(2) & ~ignored
        self._check_ids("positive label", labels[counts])
        self._check_ids("negative label", own[~ignored])
        # Something must be scored in the place of what does not count: item 0, which every catalogue has.
        labels = labels.masked_fill(~counts, 0)
        asked = negative_labels.masked_fill(negative_labels == self.negative_labels_ignore_index, 0)
        try:
            positive = self.logits_callback(hidden, labels)
            if asked.dim() == 2:
                negative = self._scores_by_row(model_embeddings, asked, chosen)
            else:
                negative = self.logits_callback(hidden, asked if asked.dim() == 1 else asked[chosen])
        except IndexError as error:
            raise self.error(f"a label or negative lies beyond the catalogue ({error})") from error
        both = full_precision(positive), full_precision(negative)
        scores = Scores(*both, labels, counts, own, ~(ignored | collided), collided)
        return self.reduced(self.terms(scores), chosen, counts)

    def _check_ids(self, what: str, ids: Tensor) -> None:
        """``UserError`` for ids that are no item: below 0, or without a weight."""
        if not ids.numel():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise self.error(f"a {what} is {low}: ids start at 0")
        if self.weight is not None and high >= len(self.weight):
            raise self.error(f"a {what} is {high}, and weight has {len(self.weight)} numbers")

    def _scores_by_row(self, model_embeddings: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
        """``[M, K]`` scores with the ``ids [B, K]`` of each position's row; ``[M, K, D]`` is never made."""
        owner = getattr(self.logits_callback, "__self__", None)
        # One product of rectangles beats a call a row, where the callback is a model's own and takes them.
        if getattr(owner, "scores_rectangles", False):
            hidden = model_embeddings.masked_fill(~chosen[:, :, None], 0.0)
            return self.logits_callback(hidden, ids)[chosen]
        rows = model_embeddings[chosen].split(chosen.sum(1).tolist())
        return torch.cat([self.logits_callback(row, own) for row, own in zip(rows, ids) if len(row)])

    def own_terms(self, scores: Scores) -> Terms:
        weights = scores.counts.to(scores.positive.dtype)
        return self.core.terms(scores.positive, scores.negative, weights, scores.kept)


class CrossEntropy(ReplayLoss):
    """``-ln softmax`` of each target, with torch's ``weight`` by item and ``label_smoothing``.

    As in torch's cross-entropy: the label's weight for its own term, every class's for its share of the smoothing, which is
    spread over the target and the negatives that compete.
    """

    takes = ("weight", "label_smoothing")

    def terms(self, scores: Scores) -> Terms:
        own, weights = self.own_terms(scores).values, self._weights_of(scores.labels, scores)
        weighted = weights * own
        if self.label_smoothing == 0:
            return Terms(weighted, weights)
        log_total = own + scores.positive
        shares = self._weights_of(scores.items, scores) * scores.kept
        log_scores = (shares * scores.negative.where(scores.kept, 0.0)).sum(1, keepdim=True)
        others = log_total * shares.sum(1, keepdim=True) - log_scores
        smooth = (weighted + others) / (1 + scores.kept.sum(1, keepdim=True))
        return Terms(torch.lerp(weighted, smooth, self.label_smoothing), weights)

    def _weights_of(self, ids: Tensor, scores: Scores) -> Tensor:
        """Each id's weight; one below 0 (no item, left out of every sum) has item 0's."""
        if self.weight is None:
            return scores.positive.new_ones(ids.shape)
        return self.weight[ids.clamp(min=0)].to(scores.positive.dtype)
