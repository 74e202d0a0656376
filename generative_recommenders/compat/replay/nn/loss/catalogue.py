"""RePlay's losses under their documented names, arguments and defaults.

A loss scores through its ``logits_callback``, which the model sets: ``callback(h)`` gives logits ``[M, V]``
of hidden states ``[M, D]``; ``callback(h, ids)`` gives ``[M, K]`` for ids ``[K]`` (shared) or ``[M, K]``.
Only positions with a target are scored. Because the callback hands over logits, the full-catalogue losses
hold ``[M, V]`` here; ``objectives.losses.catalogue`` do not.

Forward takes ``model_embeddings [B, L, D]``, ``positive_labels [B, L, P]`` int64, for sampled losses
``negative_labels`` (``[K]``, ``[B, K]`` or ``[B, L, K]``), and ``target_padding_mask [B, L, P]`` bool, True =
counts. The result is a scalar; no target at all, and a label or negative outside of the catalogue, is a
``UserError``. A masked label adds no term, and in the softmax losses it still is no negative of its position.

Every loss takes ``reduction``, ``ignore_index`` and ``padding_idx`` (`ReplayLoss`). Of the arguments of
``torch.nn.CrossEntropyLoss`` and ``BCEWithLogitsLoss`` further take: CE, CEWeighted, CESampled and LogOutCE
``weight`` ``[V]`` and ``label_smoothing``; BCE ``weight`` and ``pos_weight``, both ``[V]``. Any other one is a
``UserError``.

Where we differ on purpose: label smoothing of a sampled loss and of LogOutCE spreads over the negatives that
are kept (there it is infinite as soon as one is masked); ``weight`` of a sampled loss is by item, not by
place among the candidates; and BCE leaves the caller's mask as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from generative_recommenders.compat.replay.nn.loss.base import (
    CROSS_ENTROPY,
    Positions,
    ReplayLoss,
    weighted_terms,
    weights_of,
)
from generative_recommenders.objectives.losses import catalogue
from generative_recommenders.objectives.losses.catalogue import is_label
from generative_recommenders.objectives.losses.sampled import Terms, full_precision


class _CatalogueLoss(ReplayLoss, ABC):
    """A loss against all items. cardinality: items of the catalogue; further logits are left out."""

    def __init__(self, cardinality: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.cardinality = cardinality

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        target_padding_mask: Tensor,
    ) -> Tensor:
        """The loss, see the module."""
        positions = self.positions(model_embeddings, positive_labels, target_padding_mask)
        return self.reduced(self.terms(*self._scored(positions)), positions)

    @abstractmethod
    def terms(self, logits: Tensor, positions: Positions) -> Terms:
        """The loss of logits ``[M, V]``; labels that are no items are -1."""

    def _scored(self, positions: Positions) -> tuple[Tensor, Positions]:
        logits = self.logits_callback(positions.hidden)
        if self.cardinality is not None:
            logits = logits[:, : self.cardinality]
        num_items = logits.shape[1]
        self.check_item_weights(num_items)
        outside = (positions.labels < 0) | (positions.labels >= num_items)
        if (outside & positions.counts).any():
            raise self.refusal(f"a positive label lies outside of 0..{num_items - 1}")
        return full_precision(logits), positions._replace(labels=positions.labels.masked_fill(outside, -1))


class BCE(_CatalogueLoss):
    """Pointwise binary cross-entropy over all items, mean over positions.

    kwargs: of ``torch.nn.BCEWithLogitsLoss``, see the module; ``weight`` ``[V]`` weighs the items,
        ``pos_weight`` ``[V]`` those that are labels besides.
    masked_labels: "ignored", as documented: a masked label beside one that counts is an item like any other;
        "targets": it is a target of 1 all the same, what RePlay's code computes.
    """

    takes = (*ReplayLoss.takes, "weight", "pos_weight")

    def __init__(self, *, masked_labels: Literal["ignored", "targets"] = "ignored", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if masked_labels not in ("ignored", "targets"):
            raise self.refusal(f"masked_labels is {masked_labels!r}: give 'ignored' or 'targets'")
        self.masked_labels = masked_labels

    def terms(self, logits: Tensor, positions: Positions) -> Terms:
        labels = positions.labels
        if self.masked_labels == "ignored":
            labels = labels.masked_fill(~positions.counts, -1)
        target = is_label(labels, logits.shape[1]).to(logits.dtype)
        values = F.binary_cross_entropy_with_logits(
            logits, target, self.weight, reduction="none", pos_weight=self.pos_weight
        ).sum(1)
        return Terms(values, torch.ones_like(values))


class _SoftmaxLoss(_CatalogueLoss):
    """``-ln softmax`` of each positive, with torch's ``weight`` by item and ``label_smoothing``."""

    takes = CROSS_ENTROPY
    core: catalogue.CatalogueLoss
    negative_labels_ignore_index = -100

    def terms(self, logits: Tensor, positions: Positions) -> Terms:
        labels, weights = positions.excluding(self.negative_labels_ignore_index, logits.shape[1])
        own = self.core.terms_of_logits(logits, labels, weights).values[:, : positions.labels.shape[1]]
        positive = logits.gather(1, positions.labels.clamp(min=0))
        own_weights = weights_of(self.weight, positions.labels, logits.dtype)
        kept = ~is_label(labels, logits.shape[1])
        return weighted_terms(own, own_weights, self.label_smoothing, positive, logits, kept, self.weight)


class CE(_SoftmaxLoss):
    """Softmax cross-entropy over all items, one positive a position, mean over positions.

    kwargs: of ``torch.nn.CrossEntropyLoss``, see the module; ``weight`` ``[V]`` weighs the items, and the
        mean divides by the sum of the labels' weights.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.core = catalogue.CE()

    def positions(self, hidden: Tensor, labels: Tensor, target_padding_mask: Tensor) -> Positions:
        if labels.shape[-1] != 1:
            raise self.refusal(
                f"takes one positive a position, not {labels.shape[-1]}: use LogInCE or LogOutCE"
            )
        return super().positions(hidden, labels, target_padding_mask)


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
            raise self.refusal(f"the batch has no feature {self.feature_name!r} to weigh samples by")
        positions = self.positions(model_embeddings, positive_labels, target_padding_mask)
        sample_weights = feature_tensors[self.feature_name].reshape(positive_labels.shape)[positions.chosen]
        values = self.terms(*self._scored(positions)).values * sample_weights
        return self.reduced(Terms(values, torch.ones_like(values)), positions)


class LogInCE(_CatalogueLoss):
    """``-ln(S+ / (S+ + S-))`` over all items, positives summed inside the logarithm, mean over positions.

    cardinality: items of the catalogue, padding not counted.
    log_epsilon: added inside the logarithm. clamp_border: bound of the logarithm.
    negative_labels_ignore_index: an item that is never a negative.
    """

    def __init__(
        self,
        cardinality: int,
        log_epsilon: float = 1e-6,
        clamp_border: float = 100.0,
        negative_labels_ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(cardinality, **kwargs)
        self.log_epsilon = log_epsilon
        self.clamp_border = clamp_border
        self.negative_labels_ignore_index = negative_labels_ignore_index
        self.core = catalogue.LogInCE(log_epsilon, clamp_border)

    def terms(self, logits: Tensor, positions: Positions) -> Terms:
        labels, weights = positions.excluding(self.negative_labels_ignore_index, logits.shape[1])
        return self.core.terms_of_logits(logits, labels, weights)


class LogOutCE(_SoftmaxLoss):
    """``-ln(exp(s+) / (exp(s+) + S-))`` over all items, mean over (position, positive) pairs.

    cardinality: items of the catalogue, padding not counted.
    negative_labels_ignore_index: an item that is never a negative.
    kwargs: of ``torch.nn.CrossEntropyLoss``, see the module.
    """

    def __init__(self, cardinality: int, negative_labels_ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(cardinality, **kwargs)
        self.negative_labels_ignore_index = negative_labels_ignore_index
        self.core = catalogue.LogOutCE()
