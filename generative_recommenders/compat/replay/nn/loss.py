"""RePlay's losses under their documented names, arguments and defaults, computed by the classes of
``objectives.losses``.

A loss scores through its ``logits_callback``, which the model sets: ``callback(h)`` gives logits ``[M, V]`` of hidden
states ``[M, D]``; ``callback(h, ids)`` gives ``[M, K]`` for ids ``[K]`` (shared) or ``[M, K]``. Only positions with a
target are scored. Losses over the catalogue hold all logits ``[M, V]`` here, unlike in training.

Forward takes ``model_embeddings [B, L, D]``, ``positive_labels [B, L, P]`` int64, for sampled losses
``negative_labels`` (``[K]``, ``[B, K]`` or ``[B, L, K]``), and ``target_padding_mask [B, L, P]`` bool, True = counts.
A batch without targets, and a label or negative outside the catalogue, is a ``UserError``. A masked label adds no term,
and in the softmax losses is no negative of its position either. Items equal to ``negative_labels_ignore_index`` are no
negatives.

Every loss takes ``reduction``, ``ignore_index`` and ``padding_idx`` (`ReplayLoss`), and of the arguments of torch's
losses CE, CEWeighted, CESampled and LogOutCE take ``weight [V]`` and ``label_smoothing``, BCE ``weight [V]`` and
``pos_weight [V]``. Any other argument is a ``UserError``.

Differences on purpose: label smoothing of a sampled loss and of LogOutCE spreads over the negatives that are kept (in
RePlay it is infinite as soon as one is masked); ``weight`` of a sampled loss is by item, not by place among the
candidates; BCE does not change the caller's mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.protocols import LogitsCallback, LossProto
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses import catalogue, sampled
from generative_recommenders.objectives.losses.sampled import Terms, full_precision, smoothed

__all__ = [
    "BCE",
    "CE",
    "BCESampled",
    "CESampled",
    "CEWeighted",
    "LogInCE",
    "LogInCESampled",
    "LogOutCE",
    "LogOutCESampled",
    "LossProto",
]

MaskedLabels = Literal["ignored", "targets"]


class Scores(NamedTuple):
    """The scores of the M positions that have a target: P targets against K negatives, or against the V items."""

    positive: Tensor  # [M, P]
    negative: Tensor  # [M, K]
    labels: Tensor  # [M, P]: items of the targets, -1 for none
    counts: Tensor  # [M, P] bool: the target counts
    items: Tensor  # [M, K] or [K]: items of the negatives
    kept: Tensor  # [M, K] bool: the negative competes
    collided: Tensor  # [M, K] bool: the negative is a label of its position


class ReplayLoss(nn.Module):
    """The arguments that all losses take, the choice of positions, and the reduction; ``core`` has the formula.

    ignore_index, padding_idx: labels that are treated as absent.
    reduction: "mean", "sum", or "none": ``[B, L]`` or ``[B, L, P]`` with 0 where nothing counts.
    takes: names of the further arguments of torch's losses that a class accepts.
    """

    core: Any  # of objectives.losses
    takes: ClassVar[tuple[str, ...]] = ()
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, negative_labels_ignore_index: int = -100, **arguments: Any) -> None:
        super().__init__()
        self.negative_labels_ignore_index = negative_labels_ignore_index
        known = ("reduction", "ignore_index", "padding_idx", *self.takes)
        for name in arguments.keys() - known:
            raise self.error(f"the argument {name!r} means nothing here; known: {', '.join(known)}")
        self.ignore_index: int = arguments.get("ignore_index", -100)
        self.padding_idx: int | None = arguments.get("padding_idx")
        self.reduction: str = arguments.get("reduction", "mean")
        if self.reduction not in ("mean", "sum", "none"):
            raise self.error(f"reduction is {self.reduction!r}: give one of mean, sum, none")
        self.label_smoothing: float = arguments.get("label_smoothing", 0.0)
        if not isinstance(self.label_smoothing, (int, float)) or not 0 <= self.label_smoothing <= 1:
            raise self.error(f"label_smoothing is {self.label_smoothing!r}: give a share in [0, 1]")
        for name in ("weight", "pos_weight"):
            value = arguments.get(name)
            if value is not None and (not isinstance(value, Tensor) or value.dim() != 1):
                raise self.error(f"{name} must be a tensor [V], one number an item")
            self.register_buffer(name, value)
        self.logits_callback: LogitsCallback | None = None

    def error(self, message: str) -> UserError:
        return UserError(f"{type(self).__name__}: {message}")

    def logits(self, *arguments: Tensor) -> Tensor:
        """The callback's scores of hidden states, with the items of ids where these are given."""
        if self.logits_callback is None:
            raise self.error("set logits_callback before the first call")
        return self.logits_callback(*arguments)

    def targets(self, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The positions with a target, bool ``[B, L]``, their labels ``[M, P]`` (-1 where ignored) and which of them
        count. UserError where the mask is missing or does not fit the labels."""
        if mask is None:  # as a model passes it on that was given none
            raise self.error("target_padding_mask is missing: give a bool mask of the shape of positive_labels")
        if labels.dim() != 3 or mask.shape != labels.shape or mask.dtype != torch.bool:
            kind = str(mask.dtype).removeprefix("torch.")
            given = f"{tuple(mask.shape)} {kind} for positive_labels {tuple(labels.shape)}"
            raise self.error(f"target_padding_mask is {given}: give both as [B, L, P], the mask bool")
        ignored = labels == self.ignore_index
        if self.padding_idx is not None:
            ignored = ignored | (labels == self.padding_idx)
        counts = mask & ~ignored
        chosen = counts.any(-1)
        if not chosen.any():
            raise self.error("every target is masked, there is nothing to learn from")
        return chosen, labels.masked_fill(ignored, -1)[chosen], counts[chosen]

    def terms(self, scores: Scores) -> Terms:
        """Values, multiplied by their weights already, and weights, of positions ``[M]`` or of targets ``[M, P]``."""
        return self.core.terms(scores.positive, scores.negative, scores.counts, scores.kept)

    def reduced(self, terms: Terms, chosen: Tensor, counts: Tensor) -> Tensor:
        """A scalar, or the terms at their places. Targets that do not count are left out."""
        values, weights = terms
        if values.dim() == 2:
            values, weights = values.where(counts, 0.0), weights.where(counts, 0.0)
        if self.reduction == "none":
            return values.new_zeros((*chosen.shape, *values.shape[1:])).index_put((chosen,), values)
        return values.sum() if self.reduction == "sum" else values.sum() / weights.sum()


class CatalogueLoss(ReplayLoss):
    """A loss against all items.

    cardinality: number of items without padding; logits beyond it are left out. None is the number of logits.
    """

    def __init__(
        self, cardinality: int | None = None, negative_labels_ignore_index: int = -100, **arguments: Any
    ) -> None:
        super().__init__(negative_labels_ignore_index, **arguments)
        self.cardinality = cardinality

    def forward(self, model_embeddings: Tensor, positive_labels: Tensor, target_padding_mask: Tensor) -> Tensor:
        """The loss, see the module."""
        chosen, labels, counts = self.targets(positive_labels, target_padding_mask)
        return self.reduced(self.terms(self.scores(model_embeddings[chosen], labels, counts)), chosen, counts)

    def scores(self, hidden: Tensor, labels: Tensor, counts: Tensor) -> Scores:
        """The scores of hidden states ``[M, D]`` with every item."""
        logits = full_precision(self.logits(hidden)[:, : self.cardinality])
        num_items = logits.shape[1]
        for name, given in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if given is not None and len(given) != num_items:
                raise self.error(f"{name} has {len(given)} numbers for {num_items} items")
        # A label that does not count may be anything, as padding often is the number of items.
        outside = (labels < 0) | (labels >= num_items)
        if (outside & counts).any():
            raise self.error(f"a positive label lies outside of 0..{num_items - 1}")
        labels = labels.masked_fill(outside, -1)
        collided = catalogue.is_label(labels, num_items)
        items = torch.arange(num_items, device=logits.device)
        kept = ~collided & (items != self.negative_labels_ignore_index)
        return Scores(logits.gather(1, labels.clamp(min=0)), logits, labels, counts, items, kept, collided)

    def terms(self, scores: Scores) -> Terms:
        return self.core.terms(scores.positive, scores.negative, scores.counts, scores.kept, scores.collided)


class SampledLoss(ReplayLoss):
    """A loss against sampled negatives.

    Negatives ``[K]`` are one product with all positions, ``[B, K]`` one product a row, ``[B, L, K]`` one a position. A
    model of this package scores all rows at once; any other callback is called once a row.
    """

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        negative_labels: Tensor | None,
        target_padding_mask: Tensor | None,
    ) -> Tensor:
        """The loss, see the module."""
        if negative_labels is None:  # as a model passes them on that was given none
            raise self.error("negative_labels are missing: give the items to compare with, [K], [B, K] or [B, L, K]")
        chosen, labels, counts = self.targets(positive_labels, target_padding_mask)
        hidden = model_embeddings[chosen]
        shape = tuple(negative_labels.shape)
        if len(shape) not in (1, 2, 3) or shape[:-1] != chosen.shape[: len(shape) - 1]:
            raise self.error(f"negative labels {shape}: give [K], [B, K] or [B, L, K] for {tuple(chosen.shape)}")
        if len(shape) == 1:
            own = negative_labels.expand(len(hidden), -1)
        else:
            own = negative_labels[chosen if len(shape) == 3 else chosen.nonzero()[:, 0]]
        ignored = own == self.negative_labels_ignore_index
        collided = (own[:, :, None] == labels[:, None, :]).any(2) & ~ignored
        # Something must be scored in the place of what does not count: item 0, which every catalogue has.
        asked = negative_labels.masked_fill(negative_labels == self.negative_labels_ignore_index, 0)
        # As given, where `own` repeats the ids at every position: that many int64 are more than the logits.
        negatives = asked if asked.dim() == 1 else asked[chosen if asked.dim() == 3 else chosen.any(1)]
        for what, ids in (("positive label", labels[counts]), ("negative label", negatives)):
            if ids.numel() and int(ids.min()) < 0:
                raise self.error(f"a {what} is {int(ids.min())}: ids start at 0")
            if ids.numel() and self.weight is not None and int(ids.max()) >= len(self.weight):
                raise self.error(f"a {what} is {int(ids.max())}, and weight has {len(self.weight)} numbers")
        labels = labels.masked_fill(~counts, 0)
        try:
            positive = self.logits(hidden, labels)
            if asked.dim() != 2:
                negative = self.logits(hidden, negatives)
            elif getattr(getattr(self.logits_callback, "__self__", None), "scores_rectangles", False):
                # Where the callback is a model's own, one product of rectangles beats a call a row.
                negative = self.logits(model_embeddings.masked_fill(~chosen[:, :, None], 0.0), asked)[chosen]
            else:  # a product a row: [M, K, D] is never made
                rows = hidden.split(chosen.sum(1).tolist())
                negative = torch.cat([self.logits(row, ids) for row, ids in zip(rows, asked) if len(row)])
        except IndexError as error:
            raise self.error(f"a label or negative lies beyond the catalogue ({error})") from error
        both, kept = (full_precision(positive), full_precision(negative)), ~(ignored | collided)
        return self.reduced(self.terms(Scores(*both, labels, counts, own, kept, collided)), chosen, counts)


class CrossEntropy(ReplayLoss):
    """``-ln softmax`` of each target, with torch's ``weight`` by item and ``label_smoothing``.

    As in torch's cross-entropy: the label's weight for its own term, every class's for its share of the smoothing,
    which is spread over the target and the negatives that compete.
    """

    takes = ("weight", "label_smoothing")

    def terms(self, scores: Scores) -> Terms:
        def weights_of(ids: Tensor) -> Tensor:
            # An id below 0 is no item and left out of every sum: any weight will do.
            own = torch.ones_like(ids) if self.weight is None else self.weight[ids.clamp(min=0)]
            return own.to(scores.positive.dtype)

        own, weights = super().terms(scores).values, weights_of(scores.labels)
        if self.label_smoothing == 0:
            return Terms(weights * own, weights)
        others, rest = weights_of(scores.items), (scores.kept, self.label_smoothing)
        total = smoothed(weights, others, *rest) * (own + scores.positive)
        return Terms(total - smoothed(weights * scores.positive, others * scores.negative, *rest), weights)


class BCE(CatalogueLoss):
    """Pointwise binary cross-entropy over all items, mean over positions.

    weight: ``[V]``, of the items. pos_weight: ``[V]``, of those that are labels besides.
    masked_labels: a masked label beside one that counts is an item like any other ("ignored", as RePlay documents it),
        or a target of 1 all the same ("targets", as RePlay computes it).
    """

    core = catalogue.BCE()
    takes = ("weight", "pos_weight")

    def __init__(self, *, masked_labels: MaskedLabels = "ignored", **kwargs: Any) -> None:
        if "negative_labels_ignore_index" in kwargs:
            raise self.error("every item counts: 'negative_labels_ignore_index' means nothing here")
        super().__init__(**kwargs)
        if masked_labels not in (known := get_args(MaskedLabels)):
            raise self.error(f"masked_labels is {masked_labels!r}: give one of {', '.join(known)}")
        self.masked_labels = masked_labels

    def terms(self, scores: Scores) -> Terms:
        ignored = ~scores.counts & (self.masked_labels == "ignored")
        own = catalogue.is_label(scores.labels.masked_fill(ignored, -1), scores.negative.shape[1])
        item_weights = self.weight, self.pos_weight
        return self.core.terms(scores.positive, scores.negative, scores.counts, scores.kept, own, *item_weights)


class CE(CrossEntropy, CatalogueLoss):
    """Softmax cross-entropy over all items, one positive a position, mean over positions (by their labels' weights)."""

    core = catalogue.CE()

    def targets(self, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if (count := labels.shape[-1]) != 1:
            raise self.error(f"takes one positive a position, not {count}: use LogInCE or LogOutCE")
        return super().targets(labels, mask)


class CEWeighted(CE):
    """CE with a weight for each sample: the sum of the weighted losses over the number of positions that count.

    RePlay divides by all positions, padding included, so that its loss shrinks with the padding.

    feature_name: key of ``feature_tensors`` that holds the weights, ``[B, L]`` or ``[B, L, 1]``.
    """

    def __init__(self, feature_name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.feature_name = feature_name

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        target_padding_mask: Tensor,
        feature_tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss, see the module; ``UserError`` where ``feature_tensors`` lack the weights."""
        if feature_tensors is None or self.feature_name not in feature_tensors:
            raise self.error(f"the batch has no feature {self.feature_name!r} to weigh samples by")
        chosen, labels, counts = self.targets(positive_labels, target_padding_mask)
        sample_weights = feature_tensors[self.feature_name]
        if sample_weights.numel() != positive_labels.numel():
            given, wanted = tuple(sample_weights.shape), tuple(positive_labels.shape[:2])
            raise self.error(f"feature {self.feature_name!r} {given}: give a weight for each position, {wanted}")
        sample_weights = sample_weights.reshape(positive_labels.shape)[chosen]
        values = self.terms(self.scores(model_embeddings[chosen], labels, counts)).values * sample_weights
        return self.reduced(Terms(values, torch.ones_like(values)), chosen, counts)


class LogInCE(CatalogueLoss):
    """``-ln(S+ / (S+ + S-))`` over all items, positives summed inside the logarithm, mean over positions.

    log_epsilon: added inside the logarithm. clamp_border: bound of the logarithm.
    """

    def __init__(
        self,
        cardinality: int,
        log_epsilon: float = 1e-6,
        clamp_border: float = 100.0,
        negative_labels_ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(cardinality, negative_labels_ignore_index, **kwargs)
        self.log_epsilon, self.clamp_border = log_epsilon, clamp_border
        self.core = catalogue.LogInCE(log_epsilon, clamp_border)


class LogOutCE(CrossEntropy, CatalogueLoss):
    """``-ln(exp(s+) / (exp(s+) + S-))`` over all items, mean over (position, positive) pairs."""

    core = catalogue.LogOutCE()


class _BoundedLogarithms(SampledLoss):
    """log_epsilon: added inside each logarithm. clamp_border: bound of each logarithm."""

    core_class: type[sampled.BCESampled | sampled.LogInCESampled]

    def __init__(
        self,
        log_epsilon: float = 1e-6,
        clamp_border: float = 100.0,
        negative_labels_ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(negative_labels_ignore_index, **kwargs)
        self.log_epsilon, self.clamp_border = log_epsilon, clamp_border
        self.core = self.core_class(log_epsilon, clamp_border)


class BCESampled(_BoundedLogarithms):
    """``-[ln sigma(s+) + sum_k ln(1 - sigma(s-_k))]``, mean over (position, positive) pairs.

    A negative that is a label of its position counts with score -inf: it adds ``-ln(1 + log_epsilon)``, as in RePlay.
    """

    core_class = sampled.BCESampled

    def terms(self, scores: Scores) -> Terms:
        negative = scores.negative.masked_fill(scores.collided, -torch.inf)
        return super().terms(scores._replace(negative=negative, kept=scores.kept | scores.collided))


class LogInCESampled(_BoundedLogarithms):
    """``-ln(S+ / (S+ + S-))`` over sampled negatives, positives summed inside the logarithm, mean over positions."""

    core_class = sampled.LogInCESampled


class CESampled(CrossEntropy, SampledLoss):
    """Softmax cross-entropy of a positive among itself and its negatives, mean over positives."""

    core = sampled.SampledSoftmaxLoss()


LogOutCESampled = CESampled
"""The same formula: one softmax per positive over sampled negatives that are no labels. (RePlay's name is CE's.)"""
