"""RePlay's losses under their documented names, arguments and defaults, over the losses of this package.

A loss scores through its ``logits_callback``, which the model sets: ``callback(h)`` gives logits ``[M, V]``
of hidden states ``[M, D]``; ``callback(h, ids)`` gives ``[M, K]`` for ids ``[K]`` (shared) or ``[M, K]``.
Only positions with a target are scored. Because the callback hands over logits, the full-catalogue losses
hold ``[M, V]`` here; ``objectives.catalogue_losses`` do not.

Forward takes ``model_embeddings [B, L, D]``, ``positive_labels [B, L, P]`` int64, for sampled losses
``negative_labels`` (``[K]``, ``[B, K]`` or ``[B, L, K]``), and ``target_padding_mask [B, L, P]`` bool, True =
counts. The result is a scalar; no target at all is a ``UserError``. A masked label adds no term, and still is
no negative of its position.

``ignore_index`` and ``padding_idx`` name labels that are no labels at all. Of the arguments of
``torch.nn.CrossEntropyLoss`` those that mean something here are accepted: ``label_smoothing``, ``reduction``
("mean", "sum"), and for CE ``weight``. Where we differ on purpose: label smoothing of a sampled loss spreads
over the negatives that are kept (there it is infinite as soon as one is masked), and BCE leaves the caller's
mask as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from generative_recommenders.features import UserError
from generative_recommenders.objectives import catalogue_losses, losses, scalable_cross_entropy
from generative_recommenders.objectives.losses import LossOutput
from generative_recommenders.objectives.scalable_cross_entropy import SCEParams

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
    "SCEParams",
    "ScalableCrossEntropyLoss",
]

LogitsCallback = Callable[..., Tensor]


class _Positions(NamedTuple):
    """The M positions with at least one target that counts."""

    chosen: Tensor  # [B, L] bool
    hidden: Tensor  # [M, D]
    labels: Tensor  # [M, P], -1 where ignored
    counts: Tensor  # [M, P] bool


class _ReplayLoss(nn.Module):
    """Scoring by callback, choice of positions, reduction."""

    def __init__(
        self, *, ignore_index: int = -100, padding_idx: int | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise UserError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        self.ignore_index = ignore_index
        self.padding_idx = padding_idx
        self.reduction = reduction
        self._logits_callback: LogitsCallback | None = None

    @property
    def logits_callback(self) -> LogitsCallback:
        """What turns hidden states, and item ids if given, into logits; ``UserError`` until it is set."""
        if self._logits_callback is None:
            raise UserError(f"{type(self).__name__}: set logits_callback before the first call")
        return self._logits_callback

    @logits_callback.setter
    def logits_callback(self, callback: LogitsCallback | None) -> None:
        self._logits_callback = callback

    def _positions(self, hidden: Tensor, labels: Tensor, target_padding_mask: Tensor) -> _Positions:
        ignored = labels == self.ignore_index
        if self.padding_idx is not None:
            ignored = ignored | (labels == self.padding_idx)
        counts = target_padding_mask & ~ignored
        chosen = counts.any(-1)
        if not chosen.any():
            raise UserError(f"{type(self).__name__}: every target is masked, there is nothing to learn from")
        return _Positions(chosen, hidden[chosen], labels.masked_fill(ignored, -1)[chosen], counts[chosen])

    def _reduced(self, output: LossOutput) -> Tensor:
        return output.sum if self.reduction == "sum" else output.mean()


class _CatalogueLoss(_ReplayLoss):
    """A loss against all items. cardinality: items of the catalogue; further logits are left out."""

    def __init__(
        self, core: catalogue_losses.CatalogueLoss, cardinality: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.core = core
        self.cardinality = cardinality

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        target_padding_mask: Tensor,
    ) -> Tensor:
        """The loss, scalar; see the module."""
        positions = self._positions(model_embeddings, positive_labels, target_padding_mask)
        return self._reduced(self._output(positions, positions.counts.to(torch.float32)))

    def _output(self, positions: _Positions, weights: Tensor) -> LossOutput:
        logits = self.logits_callback(positions.hidden)
        if self.cardinality is not None:
            logits = logits[:, : self.cardinality]
        num_items = logits.shape[1]
        outside = (positions.labels < 0) | (positions.labels >= num_items)
        if (outside & positions.counts).any():
            raise UserError(f"{type(self).__name__}: a positive label lies outside of 0..{num_items - 1}")
        return self.core.from_logits(logits, positions.labels.masked_fill(outside, -1), weights)


class BCE(_CatalogueLoss):
    """Pointwise binary cross-entropy over all items, mean over positions.

    kwargs: ``reduction`` and the ignored labels, see the module.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(catalogue_losses.BCE(), **kwargs)


class CE(_CatalogueLoss):
    """Softmax cross-entropy over all items, one positive a position, mean over positions.

    kwargs: of ``torch.nn.CrossEntropyLoss``, see the module; ``weight`` ``[V]`` weighs positions by their
        label, and the mean divides by the sum of these weights.
    """

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(catalogue_losses.CE(label_smoothing=label_smoothing), **kwargs)
        if weight is not None and label_smoothing > 0:
            raise UserError("CE takes item weights or label smoothing, not both")
        self.register_buffer("weight", weight)

    def _positions(self, hidden: Tensor, labels: Tensor, target_padding_mask: Tensor) -> _Positions:
        if labels.shape[-1] != 1:
            raise UserError(
                f"CE takes one positive a position, not {labels.shape[-1]}: use LogInCE or LogOutCE"
            )
        return super()._positions(hidden, labels, target_padding_mask)

    def _output(self, positions: _Positions, weights: Tensor) -> LossOutput:
        if self.weight is not None:
            weights = weights * self.weight[positions.labels]
        return super()._output(positions, weights)


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
        """The loss, scalar; ``UserError`` where ``feature_tensors`` lack the weights."""
        if feature_tensors is None or self.feature_name not in feature_tensors:
            raise UserError(f"CEWeighted: the batch has no feature {self.feature_name!r} to weigh samples by")
        positions = self._positions(model_embeddings, positive_labels, target_padding_mask)
        sample_weights = feature_tensors[self.feature_name].reshape(positive_labels.shape)[positions.chosen]
        total = self._output(positions, positions.counts * sample_weights).sum
        return self._reduced(LossOutput(total, positions.counts.sum()))


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
        super().__init__(catalogue_losses.LogInCE(log_epsilon, clamp_border), cardinality, **kwargs)
        self.negative_labels_ignore_index = negative_labels_ignore_index

    def _output(self, positions: _Positions, weights: Tensor) -> LossOutput:
        return super()._output(*_never_a_negative(positions, weights, self.negative_labels_ignore_index))


class LogOutCE(_CatalogueLoss):
    """``-ln(exp(s+) / (exp(s+) + S-))`` over all items, mean over (position, positive) pairs.

    cardinality: items of the catalogue, padding not counted.
    negative_labels_ignore_index: an item that is never a negative.
    """

    def __init__(self, cardinality: int, negative_labels_ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(catalogue_losses.LogOutCE(), cardinality, **kwargs)
        self.negative_labels_ignore_index = negative_labels_ignore_index

    def _output(self, positions: _Positions, weights: Tensor) -> LossOutput:
        return super()._output(*_never_a_negative(positions, weights, self.negative_labels_ignore_index))


def _never_a_negative(positions: _Positions, weights: Tensor, item: int) -> tuple[_Positions, Tensor]:
    """The positions with ``item`` as one more label that does not count."""
    extra = torch.full_like(positions.labels[:, :1], item)
    labels = torch.cat([positions.labels, extra], 1)
    counts = torch.cat([positions.counts, torch.zeros_like(extra, dtype=torch.bool)], 1)
    widened = positions._replace(labels=labels, counts=counts)
    return widened, torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)


class _SampledLoss(_ReplayLoss):
    """A loss against sampled negatives."""

    def __init__(self, core: losses.SampledLoss, negative_labels_ignore_index: int, **options: Any) -> None:
        super().__init__(**options)
        self.core = core
        self.negative_labels_ignore_index = negative_labels_ignore_index

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        negative_labels: Tensor,
        target_padding_mask: Tensor,
    ) -> Tensor:
        """The loss, scalar; see the module."""
        positions = self._positions(model_embeddings, positive_labels, target_padding_mask)
        shared, own = _negatives_of(negative_labels, positions.chosen)
        ignored = own == self.negative_labels_ignore_index
        collided = (own[:, :, None] == positions.labels[:, None, :]).any(2)
        wanted = shared.masked_fill(shared == self.negative_labels_ignore_index, 0)
        positive = self.logits_callback(positions.hidden, positions.labels.masked_fill(~positions.counts, 0))
        negative = self.logits_callback(positions.hidden, wanted)
        return self._reduced(self._output(positive, negative, positions.counts, ignored, collided))

    def _output(
        self, positive: Tensor, negative: Tensor, counts: Tensor, ignored: Tensor, collided: Tensor
    ) -> LossOutput:
        return self.core(positive, negative, counts, ~(ignored | collided))


def _negatives_of(labels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Ids to score (``[K]`` if shared, else ``[M, K]``), and each position's ids ``[M, K]``."""
    if labels.dim() == 1:
        return labels, labels.expand(int(chosen.sum()), -1)
    if labels.dim() == 2 and labels.shape[0] == chosen.shape[0]:
        own = labels[chosen.nonzero()[:, 0]]
        return own, own
    if labels.dim() == 3 and labels.shape[:2] == chosen.shape:
        return labels[chosen], labels[chosen]
    raise UserError(
        f"negative labels {tuple(labels.shape)}: give [K], [B, K] or [B, L, K] for {tuple(chosen.shape)}"
    )


class BCESampled(_SampledLoss):
    """``-[ln sigma(s+) + sum_k ln(1 - sigma(s-_k))]``, mean over (position, positive) pairs.

    A negative that is a label of its position counts with score -inf: it adds ``-ln(1 + log_epsilon)``, as in
    RePlay.

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
        super().__init__(losses.BCESampled(log_epsilon, clamp_border), negative_labels_ignore_index, **kwargs)

    def _output(
        self, positive: Tensor, negative: Tensor, counts: Tensor, ignored: Tensor, collided: Tensor
    ) -> LossOutput:
        return self.core(positive, negative.masked_fill(collided, -torch.inf), counts, ~ignored)


class CESampled(_SampledLoss):
    """Softmax cross-entropy of a positive among itself and its negatives, mean over positives.

    negative_labels_ignore_index: a negative that does not count.
    kwargs: of ``torch.nn.CrossEntropyLoss``, see the module.
    """

    def __init__(
        self, negative_labels_ignore_index: int = -100, *, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(losses.SampledSoftmaxLoss(label_smoothing), negative_labels_ignore_index, **kwargs)


LogOutCESampled = CESampled
"""Sampled negatives that are no labels, a softmax a pair: the same formula. (RePlay's name points at CE.)"""


class LogInCESampled(_SampledLoss):
    """``-ln(S+ / (S+ + S-))`` over sampled negatives, mean over positions.

    log_epsilon: added inside the logarithm. clamp_border: bound of the logarithm.
    negative_labels_ignore_index: a negative that does not count.
    """

    def __init__(
        self,
        log_epsilon: float = 1e-6,
        clamp_border: float = 100.0,
        negative_labels_ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        core = losses.LogInCESampled(log_epsilon, clamp_border)
        super().__init__(core, negative_labels_ignore_index, **kwargs)


class ScalableCrossEntropyLoss:
    """SCE over rectangles (``objectives.scalable_cross_entropy``), drawing from torch's global generator.

    sce_params: ``SCEParams``.
    """

    def __init__(self, sce_params: SCEParams) -> None:
        self.core = scalable_cross_entropy.ScalableCrossEntropyLoss(sce_params)

    def __call__(
        self,
        embeddings: Tensor,
        positive_labels: Tensor,
        all_embeddings: Tensor,
        padding_mask: Tensor,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean loss, scalar.

        embeddings: ``[B, L, D]``. positive_labels: ``[B, L]`` int64. all_embeddings: ``[V, D]``.
        padding_mask: ``[B, L]`` bool, True = real. tokens_mask: ``[B, L]`` bool, True = does not count in the
            mean.
        """
        counted = padding_mask if tokens_mask is None else padding_mask & ~tokens_mask
        output = self.core(
            embeddings.flatten(0, 1),
            all_embeddings,
            positive_labels.masked_fill(~padding_mask, 0).flatten(),
            counted.flatten(),
            selectable=padding_mask.flatten(),
        )
        return output.mean()
