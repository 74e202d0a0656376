"""Losses over score matrices: the positives of a token against sampled negatives.

Products, temperature, L2 norm, log Q and collisions are settled before (``objectives/scoring.py``); a loss
here only turns scores into ``Terms(values, weights)``, whose weighted sum is the ``LossOutput``. Scores are lifted to
float32 (float64 stays), also under autocast, and logarithms are taken in their stable forms. NaN scores of entries that
count give a NaN loss; entries that do not count (weight 0, mask False) never change the sum.

Two names, one formula:

* ``SampledSoftmaxLoss`` = ``CESampled`` = ``LogOutCESampled``: one softmax for each positive.
* ``BCELoss`` is the BCE of the HSTU program (means), ``BCESampled`` RePlay's (sums); ``GBCELoss`` has its
  own weighting.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.config.fields import NonNegative, Positive, Probability, Share
from generative_recommenders.config.registry import register_loss
from generative_recommenders.errors import UserError
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp
from generative_recommenders.types import LossOutput


class Terms(NamedTuple):
    """A loss before it is summed: values and their weights, ``[T]`` (a position) or ``[T, P]`` (a target)."""

    values: Tensor
    weights: Tensor


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def weighted(values: Tensor, weights: Tensor) -> LossOutput:
    """``sum(weights * values)`` over the entries of non-zero weight, and the sum of the weights."""
    weights = weights.to(values.dtype)
    # where, not a product: 0 times the NaN or infinity of an entry that does not count is NaN.
    terms = torch.where(weights != 0, weights * values, torch.zeros_like(values))
    return LossOutput(terms.sum(), weights.sum().detach())


def log_plus_epsilon(log_p: Tensor, epsilon: float, clamp_border: float) -> Tensor:
    """``ln(p + epsilon)`` limited to ``[-clamp_border, clamp_border]``, from ``ln p``.

    The stable form is epsilon 0 and an infinite border: ``log_p`` itself.
    """
    if epsilon > 0:
        log_p = torch.logaddexp(log_p, torch.full_like(log_p, math.log(epsilon)))
    return log_p if math.isinf(clamp_border) else log_p.clamp(-clamp_border, clamp_border)


def smoothed(own: Tensor, others: Tensor, mask: Tensor, share: float) -> Tensor:
    """``own [T, P]``, a share of it replaced by the mean of itself and those ``others [T, R]`` that count
    (``mask``)."""
    kept_sum = torch.where(mask, others, 0.0).sum(1, keepdim=True)
    return torch.lerp(own, (own + kept_sum) / (1 + mask.sum(1, keepdim=True)), share)


class SampledLoss(nn.Module, ABC):
    """A loss over positive and negative scores."""

    SUPPLIED = frozenset({"num_items"})
    needs_negatives = True
    needs_ratings = False
    """True where ``forward`` must be given ``positive_ratings``."""
    raw_positives = False
    """True where positives are scored without the items' normalisation."""

    def forward(
        self,
        positive_scores: Tensor,
        negative_scores: Tensor,
        positive_weights: Tensor,
        negative_mask: Tensor,
        positive_ratings: Tensor | None = None,
    ) -> LossOutput:
        """Loss of T tokens.

        positive_scores: ``[T, P]`` float.
        negative_scores: ``[T, R]`` float.
        positive_weights: ``[T, P]`` float, 0 = the positive does not count.
        negative_mask: ``[T, R]`` bool, True = the negative counts (no collision, no padding).
        positive_ratings: ``[T, P]``, where `needs_ratings`.
        Raises ``ValueError`` for shapes that do not agree.
        """
        given = positive_scores, negative_scores, positive_weights, negative_mask
        matrices = positive_scores.dim() == negative_scores.dim() == 2 and len({len(x) for x in given}) == 1
        if not matrices or [x.shape for x in given[:2]] != [x.shape for x in given[2:]]:
            shapes = ", ".join(str(list(x.shape)) for x in given)
            raise ValueError(f"scores, weights and mask must be [T, P], [T, R], [T, P] and [T, R], got {shapes}")
        scores = full_precision(positive_scores), full_precision(negative_scores)
        ratings = (positive_ratings,) if self.needs_ratings else ()
        return weighted(*self.terms(*scores, positive_weights, negative_mask, *ratings))

    @abstractmethod
    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        """The loss of scores in full precision, before it is summed; arguments as of `forward`, ratings where it needs
        them."""


@register_loss("SampledSoftmaxLoss", "CESampled", "LogOutCESampled", "ContrastiveLoss")
class SampledSoftmaxLoss(SampledLoss):
    """``-ln softmax`` of each positive among itself and the negatives that count.

    Sampled cross-entropy; RePlay's ``CESampled``; the loss of the HSTU program (arXiv 2402.17152), which
    sets the score of a collision to -50,000 where this one leaves it out. Other positives of a position are
    not in the denominator. ``weight`` is the sum of the positive weights. InfoNCE, genrec's ``ContrastiveLoss``, is
    this loss of cosines (``item_l2_norm``, ``user_embedding_norm`` "l2_norm").

    label_smoothing: share in [0, 1) of the target spread evenly over the positive and those negatives.
    """

    def __init__(self, label_smoothing: Share = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        log_total = torch.logaddexp(positive, masked_logsumexp(negative, mask)[:, None])
        target_score = positive
        if self.label_smoothing > 0:
            target_score = smoothed(positive, negative, mask, self.label_smoothing)
        return Terms(log_total - target_score, weights)


@register_loss("BCELoss")
class BCELoss(SampledLoss):
    """Binary cross-entropy of the HSTU program: half from the positive, half from the negatives.

    ``w * (softplus(-s+) + mean_k softplus(s-_k)) / 2`` over the negatives that count; a row whose negatives
    all collided is removed, with its weight. The published form has one negative, and a collision removes the
    row; its positives are not normalised.
    """

    raw_positives = True

    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        count = mask.sum(1, keepdim=True)
        negative_mean = _masked_softplus(negative, mask).sum(1, keepdim=True) / count.clamp(min=1)
        values = (F.softplus(-positive) + negative_mean) / 2
        return Terms(values, weights * (count > 0))


@register_loss("BCELossWithRatings")
class BCELossWithRatings(SampledLoss):
    """Binary cross-entropy of the positive's score against its rating (the HSTU program's); no negatives.

    The published class takes the rating itself as the target, which suits ratings in [0, 1] only. Here the
    target is ``rating >= threshold`` (ratings of 1 to 5), or the rating itself with ``threshold=None``.

    threshold: lowest high rating, in the data's units.
    """

    needs_ratings = True

    def __init__(self, threshold: float | None = 4.0) -> None:
        super().__init__()
        self.threshold = threshold

    def terms(
        self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor, ratings: Tensor | None = None
    ) -> Terms:
        """``UserError`` without ratings ``[T, P]``, and where they are no targets."""
        if ratings is None:
            raise UserError("BCELossWithRatings needs ratings, and the data has none: choose another loss_module")
        if self.threshold is not None:
            ratings = ratings >= self.threshold
        elif (((ratings < 0) | (ratings > 1)) & (weights != 0)).any():
            raise UserError("BCELossWithRatings: ratings outside [0, 1] are no probabilities: set a threshold")
        return Terms(F.softplus(positive) - ratings.to(positive.dtype) * positive, weights)


class BoundedLogarithms(SampledLoss):
    """A loss whose logarithms are `log_plus_epsilon`.

    epsilon: added inside each logarithm (RePlay: 1e-6); 0 is the exact form, by softplus and logsumexp.
    clamp_border: each logarithm is limited to ``[-clamp_border, clamp_border]`` (RePlay: 100).
    """

    def __init__(self, epsilon: NonNegative = 0.0, clamp_border: Positive = math.inf) -> None:
        super().__init__()
        self.epsilon, self.clamp_border = epsilon, clamp_border


@register_loss("BCESampled")
class BCESampled(BoundedLogarithms):
    """``-[ln sigma(s+) + sum_k ln(1 - sigma(s-_k))]`` for each (position, positive) pair (RePlay's)."""

    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        log_positive = log_plus_epsilon(F.logsigmoid(positive), self.epsilon, self.clamp_border)
        log_negative = log_plus_epsilon(-_masked_softplus(negative, mask), self.epsilon, self.clamp_border)
        kept = torch.where(mask, log_negative, 0.0).sum(1, keepdim=True)
        return Terms(-(log_positive + kept), weights)


@register_loss("gBCE")
class GBCELoss(SampledLoss):
    """Generalised binary cross-entropy, gBCE (arXiv 2308.07192, gSASRec).

    ``-(ln sigma(s+)^beta + sum_k ln(1 - sigma(s-_k))) / (1 + K)`` over the K negatives that count, where
    ``beta = alpha (t (1 - 1/alpha) + 1/alpha)`` and ``alpha = R / (V - 1)`` is the sampling rate of the R
    drawn negatives. t = 0 is plain BCE (beta 1); t = 1 undoes the overconfidence of sampling (beta = alpha).

    num_items: V, items of the catalogue.
    calibration: t, from 0 for plain BCE to 1.
    """

    def __init__(self, num_items: int, calibration: Probability = 0.75) -> None:
        super().__init__()
        if num_items < 2:
            raise UserError(f"gBCE needs at least 2 items, not {num_items}")
        self.num_items = num_items
        self.calibration = calibration

    def beta(self, num_negatives: int) -> float:
        """The exponent of the positive's probability at R negatives, in (0, 1]."""
        alpha = min(1.0, num_negatives / (self.num_items - 1))
        return self.calibration * (alpha - 1) + 1

    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        negative_sum = _masked_softplus(negative, mask).sum(1, keepdim=True)
        count = 1 + mask.sum(1, keepdim=True)
        values = (self.beta(negative.shape[1]) * F.softplus(-positive) + negative_sum) / count
        return Terms(values, weights)


@register_loss("LogInCESampled")
class LogInCESampled(BoundedLogarithms):
    """``-ln(S+ / (S+ + S-))`` a position: positives are summed inside the logarithm (arXiv 2205.04507).

    S+ is the sum of exp(s) over the positives of non-zero weight, S- over the negatives that count, repeats
    counted. A position weighs as much as its heaviest positive.
    """

    def terms(self, positive: Tensor, negative: Tensor, weights: Tensor, mask: Tensor) -> Terms:
        return log_in_terms(positive, weights, masked_logsumexp(negative, mask), self.epsilon, self.clamp_border)


def log_in_terms(positive: Tensor, weights: Tensor, log_negative: Tensor, epsilon: float, clamp_border: float) -> Terms:
    """LogInCE from positive scores ``[T, P]``, weights ``[T, P]`` and ``ln S-`` ``[T]``; see ``LogInCESampled``."""
    position_weights = weights.amax(1)
    # A position without positives takes all of them: its term is finite, and has weight 0.
    some = (position_weights != 0)[:, None]
    log_positive = masked_logsumexp(positive, (weights != 0) | ~some)
    log_p = log_positive - torch.logaddexp(log_positive, log_negative)
    return Terms(-log_plus_epsilon(log_p, epsilon, clamp_border), position_weights)


def _masked_softplus(scores: Tensor, mask: Tensor) -> Tensor:
    # softplus(-inf) is 0, and so is its gradient.
    return F.softplus(scores.masked_fill(~mask, -math.inf))
