"""RePlay's losses against sampled negatives; conventions in ``replay_losses``.

Negatives ``[K]`` are one product with all positions, ``[B, K]`` one product a row, ``[B, L, K]`` one a
position. A model of this package scores all rows at once; any other callback is called once a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generative_recommenders.compat.replay.nn.loss.base import (
    CROSS_ENTROPY,
    Positions,
    ReplayLoss,
    weighted_terms,
    weights_of,
)
from generative_recommenders.objectives.losses import sampled
from generative_recommenders.objectives.losses.sampled import Terms, full_precision


class Candidates(NamedTuple):
    """Scores of the M positions."""

    positive: Tensor  # [M, P]
    negative: Tensor  # [M, K]
    ids: Tensor  # [M, K] the negatives
    ignored: Tensor  # [M, K] bool: no item
    collided: Tensor  # [M, K] bool: a label of the position

    @property
    def kept(self) -> Tensor:
        """``[M, K]`` bool: negatives that compete."""
        return ~(self.ignored | self.collided)


class SampledLoss(ReplayLoss, ABC):
    """A loss against sampled negatives."""

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
        """The loss, see ``replay_losses``."""
        positions = self.positions(model_embeddings, positive_labels, target_padding_mask)
        own = self._negatives_of(negative_labels, positions.chosen)
        ignored = own == self.negative_labels_ignore_index
        self._check_ids("positive label", positions.labels[positions.counts])
        self._check_ids("negative label", own[~ignored])
        try:
            positive = self.logits_callback(
                positions.hidden, positions.labels.masked_fill(~positions.counts, 0)
            )
            negative = self._negative_scores(model_embeddings, negative_labels, own, positions)
        except IndexError as error:
            raise self.refusal(f"a label or negative lies beyond the catalogue ({error})") from error
        collided = (own[:, :, None] == positions.labels[:, None, :]).any(2) & ~ignored
        scores = full_precision(positive), full_precision(negative)
        return self.reduced(self.terms(Candidates(*scores, own, ignored, collided), positions), positions)

    @abstractmethod
    def terms(self, candidates: Candidates, positions: Positions) -> Terms:
        """The loss of the scores."""

    def _negatives_of(self, labels: Tensor, chosen: Tensor) -> Tensor:
        """Each position's negatives, ``[M, K]``."""
        if labels.dim() == 1:
            return labels.expand(int(chosen.sum()), -1)
        if labels.dim() == 2 and labels.shape[0] == chosen.shape[0]:
            return labels[chosen.nonzero()[:, 0]]
        if labels.dim() == 3 and labels.shape[:2] == chosen.shape:
            return labels[chosen]
        raise self.refusal(
            f"negative labels {tuple(labels.shape)}: give [K], [B, K] or [B, L, K] for {tuple(chosen.shape)}"
        )

    def _check_ids(self, what: str, ids: Tensor) -> None:
        """``UserError`` for ids that count and are no item: below 0, or without a weight."""
        if not ids.numel():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise self.refusal(f"a {what} is {low}: ids start at 0")
        if self.weight is not None and high >= len(self.weight):
            raise self.refusal(f"a {what} is {high}, and weight has {len(self.weight)} numbers")

    def _negative_scores(
        self, model_embeddings: Tensor, labels: Tensor, own: Tensor, positions: Positions
    ) -> Tensor:
        """``[M, K]``; ignored negatives are scored as item 0."""
        wanted = labels.masked_fill(labels == self.negative_labels_ignore_index, 0)
        if labels.dim() == 1:
            return self.logits_callback(positions.hidden, wanted)
        if labels.dim() == 2:
            return self._row_scores(model_embeddings, wanted, positions)
        return self.logits_callback(positions.hidden, wanted[positions.chosen])

    def _row_scores(self, model_embeddings: Tensor, ids: Tensor, positions: Positions) -> Tensor:
        """``[M, K]`` scores with the ``ids [B, K]`` of each position's row; ``[M, K, D]`` is never made."""
        chosen = positions.chosen
        owner = getattr(self.logits_callback, "__self__", None)
        if getattr(owner, "scores_rectangles", False):
            hidden = model_embeddings.masked_fill(~chosen[:, :, None], 0.0)
            return self.logits_callback(hidden, ids)[chosen]
        rows = positions.hidden.split(chosen.sum(1).tolist())
        return torch.cat([self.logits_callback(row, own) for row, own in zip(rows, ids) if len(row)])


class _BoundedLogLoss(SampledLoss, ABC):
    """A loss of logarithms that are kept finite.

    log_epsilon: added inside each logarithm. clamp_border: bound of each logarithm.
    negative_labels_ignore_index: a negative that does not count.
    """

    def __init__(
        self,
        log_epsilon: float = 1e-6,
        clamp_border: float = 100.0,
        negative_labels_ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(negative_labels_ignore_index, **kwargs)
        self.log_epsilon = log_epsilon
        self.clamp_border = clamp_border


class BCESampled(_BoundedLogLoss):
    """``-[ln sigma(s+) + sum_k ln(1 - sigma(s-_k))]``, mean over (position, positive) pairs.

    A negative that is a label of its position counts with score -inf: it adds ``-ln(1 + log_epsilon)``, as in
    RePlay.

    log_epsilon: added inside each logarithm. clamp_border: bound of each logarithm.
    negative_labels_ignore_index: a negative that does not count.
    """

    def terms(self, candidates: Candidates, positions: Positions) -> Terms:
        core = sampled.BCESampled(self.log_epsilon, self.clamp_border)
        negative = candidates.negative.masked_fill(candidates.collided, -torch.inf)
        return core.terms(candidates.positive, negative, positions.counts.float(), ~candidates.ignored)


class CESampled(SampledLoss):
    """Softmax cross-entropy of a positive among itself and its negatives, mean over positives.

    negative_labels_ignore_index: a negative that does not count.
    kwargs: of ``torch.nn.CrossEntropyLoss``, see ``replay_losses``.
    """

    takes = CROSS_ENTROPY

    def __init__(self, negative_labels_ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(negative_labels_ignore_index, **kwargs)

    def terms(self, candidates: Candidates, positions: Positions) -> Terms:
        positive, negative, kept = candidates.positive, candidates.negative, candidates.kept
        own = sampled.CESampled().terms(positive, negative, positions.counts.float(), kept).values
        own_weights = weights_of(
            self.weight, positions.labels.masked_fill(~positions.counts, 0), positive.dtype
        )
        ids = candidates.ids.masked_fill(candidates.ignored, 0)
        others = None if self.weight is None else weights_of(self.weight, ids, negative.dtype)
        return weighted_terms(own, own_weights, self.label_smoothing, positive, negative, kept, others)


LogOutCESampled = CESampled
"""Sampled negatives that are no labels, a softmax a pair: the same formula. (RePlay's name points at CE.)"""


class LogInCESampled(_BoundedLogLoss):
    """``-ln(S+ / (S+ + S-))`` over sampled negatives, mean over positions.

    log_epsilon: added inside the logarithm. clamp_border: bound of the logarithm.
    negative_labels_ignore_index: a negative that does not count.
    """

    def terms(self, candidates: Candidates, positions: Positions) -> Terms:
        core = sampled.LogInCESampled(self.log_epsilon, self.clamp_border)
        return core.terms(candidates.positive, candidates.negative, positions.counts.float(), candidates.kept)
