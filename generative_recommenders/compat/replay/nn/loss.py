"""RePlay's losses under their documented names, arguments and defaults, over the formulas of ``objectives.losses``.

A loss scores through its ``logits_callback``, which the model sets: ``callback(h)`` gives logits ``[M, V]`` of hidden states
``[M, D]``; ``callback(h, ids)`` gives ``[M, K]`` for ids ``[K]`` (shared) or ``[M, K]``. Only positions with a target are
scored. Because the callback hands over logits, losses over the catalogue hold ``[M, V]`` here; those of training do not.

Forward takes ``model_embeddings [B, L, D]``, ``positive_labels [B, L, P]`` int64, for sampled losses ``negative_labels``
(``[K]``, ``[B, K]`` or ``[B, L, K]``), and ``target_padding_mask [B, L, P]`` bool, True = counts. The result is a scalar; no
target at all, and a label or negative outside of the catalogue, is a ``UserError``. A masked label adds no term, and in the
softmax losses it still is no negative of its position. ``negative_labels_ignore_index`` names an item that is no negative.

Every loss takes ``reduction``, ``ignore_index`` and ``padding_idx`` (`ReplayLoss`). Of the arguments of
``torch.nn.CrossEntropyLoss`` and ``BCEWithLogitsLoss`` further take: CE, CEWeighted, CESampled and LogOutCE ``weight [V]`` and
``label_smoothing``; BCE ``weight`` and ``pos_weight``, both ``[V]``. Any other one is a ``UserError``.

Where we differ on purpose: label smoothing of a sampled loss and of LogOutCE spreads over the negatives that are kept (there it
is infinite as soon as one is masked); ``weight`` of a sampled loss is by item, not by place among the candidates; and BCE
leaves the caller's mask as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from generative_recommenders.compat.replay.nn.protocols import LossProto
from generative_recommenders.compat.replay.nn.scored_loss import (
    CatalogueLoss,
    CrossEntropy,
    SampledLoss,
    Scores,
)
from generative_recommenders.objectives.losses import catalogue, sampled
from generative_recommenders.objectives.losses.catalogue import is_label
from generative_recommenders.objectives.losses.sampled import Terms

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


class BCE(CatalogueLoss):
    """Pointwise binary cross-entropy over all items, mean over positions.

    weight: ``[V]``, of the items. pos_weight: ``[V]``, of those that are labels besides.
    masked_labels: "ignored", as documented: a masked label beside one that counts is an item like any other; "targets": it is a
        target of 1 all the same, what RePlay's code computes.
    """

    takes = ("weight", "pos_weight")

    def __init__(self, *, masked_labels: Literal["ignored", "targets"] = "ignored", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if masked_labels not in ("ignored", "targets"):
            raise self.error(f"masked_labels is {masked_labels!r}: give 'ignored' or 'targets'")
        self.masked_labels = masked_labels

    def terms(self, scores: Scores) -> Terms:
        labels = scores.labels
        if self.masked_labels == "ignored":
            labels = labels.masked_fill(~scores.counts, -1)
        target = is_label(labels, scores.negative.shape[1]).to(scores.negative.dtype)
        values = F.binary_cross_entropy_with_logits(
            scores.negative, target, self.weight, reduction="none", pos_weight=self.pos_weight
        ).sum(1)
        return Terms(values, torch.ones_like(values))


class CE(CrossEntropy, CatalogueLoss):
    """Softmax cross-entropy over all items, one positive a position, mean over positions. (by their labels' weights)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.core = catalogue.CE()

    def targets(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if labels.shape[-1] != 1:
            raise self.error(
                f"takes one positive a position, not {labels.shape[-1]}: use LogInCE or LogOutCE"
            )
        return super().targets(labels, mask)


class CEWeighted(CE):
    """CE with a weight for each sample; the sum of weighted losses over the number of positions that count.

    (RePlay divides by all positions, padding included, so that its loss shrinks with the padding.)

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
        sample_weights = feature_tensors[self.feature_name].reshape(positive_labels.shape)[chosen]
        values = self.terms(self.scores(model_embeddings[chosen], labels, counts)).values * sample_weights
        return self.reduced(Terms(values, torch.ones_like(values)), chosen, counts)


class LogInCE(CatalogueLoss):
    """``-ln(S+ / (S+ + S-))`` over all items, positives summed inside the logarithm, mean over positions.

    cardinality: items of the catalogue, padding not counted.
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
    """``-ln(exp(s+) / (exp(s+) + S-))`` over all items, mean over (position, positive) pairs.

    cardinality: items of the catalogue, padding not counted.
    """

    def __init__(self, cardinality: int, negative_labels_ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(cardinality, negative_labels_ignore_index, **kwargs)
        self.core = catalogue.LogOutCE()


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
        return self.own_terms(scores._replace(negative=negative, kept=scores.kept | scores.collided))


class LogInCESampled(_BoundedLogarithms):
    """``-ln(S+ / (S+ + S-))`` over sampled negatives, positives summed inside the logarithm, mean over positions."""

    core_class = sampled.LogInCESampled


class CESampled(CrossEntropy, SampledLoss):
    """Softmax cross-entropy of a positive among itself and its negatives, mean over positives."""

    def __init__(self, negative_labels_ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(negative_labels_ignore_index, **kwargs)
        self.core = sampled.CESampled()


LogOutCESampled = CESampled
"""Sampled negatives that are no labels, a softmax a pair: the same formula. (RePlay's name points at CE.)"""
