"""RePlay's transforms, by their documented names, arguments and defaults.

Conventions here are RePlay's: ids 0..cardinality-1, padding id = cardinality, rows padded on the left,
masks True = kept. Transforms without ids or padding are the package's own under another name. Differences
on purpose: a batch is never changed in place, a missing column is one clear ``UserError``, and masks are
drawn per user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.negative_transforms import (
    MultiClassNegativeSampling,
    UniformNegativeSampling,
)
from generative_recommenders.data.batch_transforms import (
    Copy,
    EqualityMask,
    Group,
    Rename,
    Select,
    SequenceRoll,
    TensorBatch,
    Unsqueeze,
    require_tensor,
)
from generative_recommenders.data.token_masks import uniform
from generative_recommenders.errors import UserError

CopyTransform = Copy
EqualityMaskTransform = EqualityMask
RenameTransform = Rename
SelectTransform = Select
SequenceRollTransform = SequenceRoll
UnsqueezeTransform = Unsqueeze


class GroupTransform(Group):
    """Moves columns into groups; names that the batch lacks are skipped, as RePlay does."""

    def __init__(self, mapping: Mapping[str, Sequence[str]]) -> None:
        super().__init__(mapping, missing_ok=True)


class NextTokenTransform(nn.Module):
    """Adds labels shifted by ``shift`` and cuts the last ``shift`` columns off every other sequence.

    label_field: the column to predict, ``[B, L + shift]``; its mask is ``label_field + mask_postfix``.
    Every tensor of two or more dimensions, groups included, except ``query_features`` loses its last
    ``shift`` columns; ``out_feature_name`` and ``out_feature_name + mask_postfix`` are added, ``[B, L]``.
    Raises ``UserError`` for a ``shift`` below 1, missing columns, columns that are no tensors or sequences of
    no more than ``shift`` columns.
    """

    def __init__(
        self,
        label_field: str,
        shift: int = 1,
        query_features: Sequence[str] | str = ("query_id", "query_id_mask"),
        out_feature_name: str = "positive_labels",
        mask_postfix: str = "_mask",
    ) -> None:
        super().__init__()
        if shift < 1:
            raise UserError(f"NextTokenTransform: shift must be at least 1, not {shift}")
        self.label_field = label_field
        self.shift = shift
        self.query_features = {query_features} if isinstance(query_features, str) else set(query_features)
        self.out_feature_name = out_feature_name
        self.mask_postfix = mask_postfix

    def _shorten(self, batch: TensorBatch) -> dict[str, Any]:
        return {name: self._shorten_one(name, value) for name, value in batch.items()}

    def _shorten_one(self, name: str, value: Any) -> Any:
        if name in self.query_features:
            return value
        if isinstance(value, Mapping):
            return self._shorten(value)
        if not isinstance(value, Tensor):
            raise UserError(f"NextTokenTransform: '{name}' must be a tensor, not a {type(value).__name__}")
        return value[:, : -self.shift] if value.dim() > 1 else value

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        labels = require_tensor(batch, self.label_field, "NextTokenTransform")
        mask = require_tensor(batch, self.label_field + self.mask_postfix, "NextTokenTransform")
        if labels.dim() < 2 or labels.shape[1] <= self.shift:
            shape = tuple(labels.shape)
            raise UserError(
                f"NextTokenTransform: '{self.label_field}' {shape} is too short for shift {self.shift}"
            )
        return {
            **self._shorten(batch),
            self.out_feature_name: labels[:, self.shift :],
            self.out_feature_name + self.mask_postfix: mask[:, self.shift :],
        }


class TokenMaskTransform(nn.Module):
    """Adds a mask of kept tokens: real ones (``token_field`` True) whose uniform draw is at least
    ``mask_prob``.

    token_field: bool ``[L]`` or ``[B, L]``, True = real, padded on the left. The result is True = kept,
    False = hidden or padding. A row that would keep everything hides its last element; one that would keep
    nothing keeps the element before it, where that is real.

    shared_mask: draw one row for the whole batch and settle those two cases on the whole tensor (its last
    row, for ``[B, L]``), padding or not, exactly as RePlay does. Off by default: draws are per user, and
    padding is never kept.
    """

    def __init__(
        self,
        token_field: str,
        out_feature_name: str = "token_mask",
        mask_prob: float = 0.15,
        generator: torch.Generator | None = None,
        *,
        shared_mask: bool = False,
    ) -> None:
        super().__init__()
        self.token_field = token_field
        self.out_feature_name = out_feature_name
        self.mask_prob = mask_prob
        self.generator = generator
        self.shared_mask = shared_mask

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        real = require_tensor(batch, self.token_field, "TokenMaskTransform")
        shape = real.shape[-1:] if self.shared_mask else real.shape
        kept = uniform(shape, real.device, self.generator) * real >= self.mask_prob
        settle = settle_shared if self.shared_mask else settle_rows
        return {**batch, self.out_feature_name: settle(kept & real, real)}


def settle_rows(kept: Tensor, real: Tensor) -> Tensor:
    """Each row ``[..., L]`` of its own: all real kept -> hide the last; none kept -> keep the one before,
    if real."""
    everything = (kept == real).all(-1)
    nothing = ~kept.any(-1) & ~everything
    kept = kept.clone()
    kept[..., -1] &= ~everything
    if kept.shape[-1] > 1:
        kept[..., -2] |= nothing & real[..., -2]
    return kept


def settle_shared(kept: Tensor, real: Tensor) -> Tensor:
    """The same two cases, settled once on the first axis of the whole tensor and blind to padding
    (RePlay)."""
    kept = kept.clone()
    if torch.equal(kept, real):
        kept[-1] = False
    elif not kept.any():
        kept[-2] = True
    return kept


class TrimTransform(nn.Module):
    """Keeps the last ``seq_len`` columns of the named features (left padding, so the newest events).

    Raises ``UserError`` for a ``seq_len`` below 1 or above a feature's width, and for missing features.
    """

    def __init__(self, seq_len: int, feature_names: Sequence[str] | str) -> None:
        super().__init__()
        if seq_len < 1:
            raise UserError(f"TrimTransform: seq_len must be positive, not {seq_len}")
        self.seq_len = seq_len
        self.feature_names = [feature_names] if isinstance(feature_names, str) else list(feature_names)

    def _trim(self, batch: TensorBatch, name: str) -> Tensor:
        feature = require_tensor(batch, name, "TrimTransform")
        if feature.shape[1] < self.seq_len:
            raise UserError(
                f"TrimTransform: '{name}' has {feature.shape[1]} columns, fewer than {self.seq_len}"
            )
        return feature[:, -self.seq_len :]

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        return {**batch, **{name: self._trim(batch, name) for name in self.feature_names}}


class UniformNegativeSamplingTransform(UniformNegativeSampling):
    """Adds ``num_negative_samples`` distinct ids of 0..cardinality-1, one vector for the batch.

    sample_distribution: ``[cardinality]`` weights, equal if None; items of weight 0 are never drawn.
    """

    def __init__(
        self,
        cardinality: int,
        num_negative_samples: int,
        *,
        out_feature_name: str = "negative_labels",
        sample_distribution: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(cardinality, num_negative_samples, sample_distribution, generator, out_feature_name)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        sampled = super().forward(batch)
        return {**sampled, self.out: sampled[self.out] - 1}


class MultiClassNegativeSamplingTransform(MultiClassNegativeSampling):
    """Adds ``[B, num_negative_samples]`` ids of 0..cardinality-1, drawn for the class that a row's selector
    names.

    sample_mask: ``[classes, cardinality]`` weights or indicators; ``UserError`` without classes.
    """

    def __init__(
        self,
        num_negative_samples: int,
        sample_mask: Tensor,
        *,
        negative_selector_name: str = "negative_selector",
        out_feature_name: str = "negative_labels",
        generator: torch.Generator | None = None,
    ) -> None:
        if sample_mask.dim() == 2 and not len(sample_mask):
            raise UserError("MultiClassNegativeSamplingTransform: sample_mask has no classes")
        super().__init__(
            num_negative_samples, sample_mask, negative_selector_name, generator, out_feature_name
        )

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        sampled = super().forward(batch)
        return {**sampled, self.out: sampled[self.out] - 1}


class FeatureNames(Protocol):
    """What the default sets read of a tensor schema."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def item_id_feature_name(self) -> str | None: ...


def make_default_sasrec_transforms(
    tensor_schema: FeatureNames, query_column: str = "query_id"
) -> dict[str, list[nn.Module]]:
    """Transforms for ``{"train", "validation", "test", "predict"}`` batches of a RePlay-style SasRec.

    Train: next-item labels with a trailing axis, ``padding_mask``, ``target_padding_mask``, and the
    schema's features grouped as ``feature_tensors``. The others: ``padding_mask`` and ``feature_tensors``.
    All other columns stay.
    """
    item = tensor_schema.item_id_feature_name
    if item is None:
        raise UserError("make_default_sasrec_transforms: the tensor schema has no item id feature")

    def group() -> nn.Module:
        return GroupTransform({"feature_tensors": list(tensor_schema.names)})

    def evaluation() -> list[nn.Module]:
        return [RenameTransform({f"{item}_mask": "padding_mask"}), group()]

    train = [
        NextTokenTransform(label_field=item, query_features=[query_column, f"{query_column}_mask"]),
        RenameTransform({f"{item}_mask": "padding_mask", "positive_labels_mask": "target_padding_mask"}),
        UnsqueezeTransform("target_padding_mask", -1),
        UnsqueezeTransform("positive_labels", -1),
        group(),
    ]
    return {"train": train, "validation": evaluation(), "test": evaluation(), "predict": evaluation()}


def make_default_twotower_transforms(
    tensor_schema: FeatureNames, query_column: str = "query_id"
) -> dict[str, list[nn.Module]]:
    """The same sets as for SasRec: both models read the same batch."""
    return make_default_sasrec_transforms(tensor_schema, query_column)
