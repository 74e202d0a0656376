"""RePlay's transforms, by their documented names, arguments and defaults: modules from one batch to a new one.

Conventions here are RePlay's: ids 0..cardinality-1, padding id = cardinality, rows padded on the left, masks True = kept.
Differences on purpose: a batch is never changed in place (the result may share storage with it), a missing column is one
clear ``UserError``, and masks are drawn per user. Columns that a transform does not name pass through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.transform.batch import TensorBatch, require, require_tensor
from generative_recommenders.data.token_masks import uniform
from generative_recommenders.errors import UserError

__all__ = [
    "CopyTransform",
    "EqualityMaskTransform",
    "GroupTransform",
    "NextTokenTransform",
    "RenameTransform",
    "SelectTransform",
    "SequenceRollTransform",
    "TokenMaskTransform",
    "TrimTransform",
    "UnsqueezeTransform",
]

MASK_OPERATIONS = {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}


class CopyTransform(nn.Module):
    """Adds independent, detached copies of columns, by a mapping of existing names to the copies' names."""

    def __init__(self, mapping: Mapping[str, str]) -> None:
        super().__init__()
        self.mapping = dict(mapping)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        copied = dict(batch)
        for old, new in self.mapping.items():
            copied[new] = require_tensor(batch, old, "CopyTransform").detach().clone()
        return copied


class RenameTransform(nn.Module):
    """Renames columns in their places, by a mapping of existing to new names.

    Raises ``UserError`` where a new name would overwrite another column.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        super().__init__()
        self.mapping = dict(mapping)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        for name in self.mapping:
            require(batch, name, "RenameTransform")
        renamed = {self.mapping.get(name, name): value for name, value in batch.items()}
        if len(renamed) < len(batch):
            raise UserError(
                f"RenameTransform: {self.mapping} would overwrite a column of the batch ({', '.join(batch)})"
            )
        return renamed


class GroupTransform(nn.Module):
    """Moves columns into groups: ``{"features": ["a", "b"]}`` puts a and b into ``batch["features"]``.

    A column may be in several groups; names that the batch lacks are skipped. ``UserError`` where a group has the name of a
    column that stays.
    """

    def __init__(self, mapping: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.mapping = {group: list(names) for group, names in mapping.items()}

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        moved = {name for names in self.mapping.values() for name in names}
        grouped = {name: value for name, value in batch.items() if name not in moved}
        for group, names in self.mapping.items():
            if group in grouped:
                raise UserError(
                    f"GroupTransform: '{group}' is already a column of the batch; choose another group name"
                )
            grouped[group] = {name: batch[name] for name in names if name in batch}
        return grouped


class UnsqueezeTransform(nn.Module):
    """Inserts a dimension of size one at ``dim`` of one column (a view)."""

    def __init__(self, column_name: str, dim: int) -> None:
        super().__init__()
        self.column_name = column_name
        self.dim = dim

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        column = require_tensor(batch, self.column_name, "UnsqueezeTransform")
        return {**batch, self.column_name: column.unsqueeze(self.dim)}


class SelectTransform(nn.Module):
    """Keeps only the named columns; ``("group", "name")`` names a column inside a group, which stays a group."""

    def __init__(self, feature_names: Sequence[str | tuple[str, ...]]) -> None:
        super().__init__()
        self.paths = [(name,) if isinstance(name, str) else tuple(name) for name in feature_names]
        for path in self.paths:
            if len(path) not in (1, 2):
                raise UserError(f"SelectTransform: {path} must be a name or a pair (group, name)")

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selected: dict[str, Any] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, *inner in self.paths:
            selected[name] = column = require(batch, name, "SelectTransform")
            for each in inner:
                one = {each: require(column, each, f"SelectTransform in '{name}'")}
                selected[name] = {**groups.get(name, {}), **one}
                groups[name] = selected[name]
        return selected


class EqualityMaskTransform(nn.Module):
    """Combines a bool mask with "this feature has this value": ``mask <- mask op (feature == value)``.

    feature_name: column of the mask's shape. mask_name: bool column that is replaced by the result.
    """

    def __init__(
        self,
        feature_name: str,
        equality_value: float | bool,
        mode: Literal["and", "or", "xor"] = "and",
        mask_name: str = "target_padding_mask",
    ) -> None:
        super().__init__()
        if mode not in MASK_OPERATIONS:
            raise UserError(
                f"EqualityMaskTransform: unknown mode '{mode}'; known: {', '.join(MASK_OPERATIONS)}"
            )
        self.feature_name = feature_name
        self.equality_value = equality_value
        self.mode = mode
        self.mask_name = mask_name

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        mask = require_tensor(batch, self.mask_name, "EqualityMaskTransform")
        equal = require_tensor(batch, self.feature_name, "EqualityMaskTransform") == self.equality_value
        return {**batch, self.mask_name: MASK_OPERATIONS[self.mode](mask, equal)}


class SequenceRollTransform(nn.Module):
    """Rolls one column along axis 1 by ``roll`` and fills the freed places with ``padding_value``."""

    def __init__(self, field_name: str, roll: int = -1, padding_value: int = 0) -> None:
        super().__init__()
        self.field_name = field_name
        self.roll = roll
        self.padding_value = padding_value

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        column = require_tensor(batch, self.field_name, "SequenceRollTransform")
        rolled = column.roll(self.roll, dims=1)
        source = torch.arange(column.shape[1], device=column.device) - self.roll
        rolled[:, (source < 0) | (source >= column.shape[1])] = self.padding_value
        return {**batch, self.field_name: rolled}


class NextTokenTransform(nn.Module):
    """Adds labels shifted by ``shift`` and cuts the last ``shift`` columns off every other sequence.

    label_field: the column to predict, ``[B, L + shift]``; its mask is ``label_field + mask_postfix``.
    Every tensor of two or more dimensions, groups included, except ``query_features`` loses its last
    ``shift`` columns; ``out_feature_name`` and ``out_feature_name + mask_postfix`` are added, ``[B, L]``.
    Raises ``UserError`` for sequences of no more than ``shift`` columns.
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

    def _shortened(self, batch: TensorBatch) -> dict[str, Any]:
        """Without the last columns, groups too."""
        shorter = dict(batch)
        for name, value in batch.items():
            if name in self.query_features:
                continue
            if isinstance(value, Mapping):
                shorter[name] = self._shortened(value)
            elif require_tensor(batch, name, "NextTokenTransform").dim() > 1:
                shorter[name] = value[:, : -self.shift]
        return shorter

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        labels = require_tensor(batch, self.label_field, "NextTokenTransform")
        mask = require_tensor(batch, self.label_field + self.mask_postfix, "NextTokenTransform")
        if labels.dim() < 2 or labels.shape[1] <= self.shift:
            shape = tuple(labels.shape)
            raise UserError(
                f"NextTokenTransform: '{self.label_field}' {shape} is too short for shift {self.shift}"
            )
        return {
            **self._shortened(batch),
            self.out_feature_name: labels[:, self.shift :],
            self.out_feature_name + self.mask_postfix: mask[:, self.shift :],
        }


class TokenMaskTransform(nn.Module):
    """Adds a mask of kept tokens: real ones (``token_field`` True) whose uniform draw is at least ``mask_prob``.

    token_field: bool ``[L]`` or ``[B, L]``, True = real, padded on the left. The result is True = kept, False = hidden or
    padding. A row that would keep everything hides its last element; one that would keep nothing keeps the element before it,
    where that is real.

    shared_mask: draw one row for the whole batch and correct those two cases on the whole tensor (its last row, for
    ``[B, L]``), padding or not, exactly as RePlay does. Off by default: draws are per user, and padding is never kept.
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
        corrected = corrected_as_replay if self.shared_mask else corrected_rows
        return {**batch, self.out_feature_name: corrected(kept & real, real)}


def corrected_rows(kept: Tensor, real: Tensor) -> Tensor:
    """Each row ``[..., L]`` of its own: all real kept -> hide the last; none kept -> keep the one before, if real."""
    everything = (kept == real).all(-1)
    nothing = ~kept.any(-1) & ~everything
    kept = kept.clone()
    kept[..., -1] &= ~everything
    if kept.shape[-1] > 1:
        kept[..., -2] |= nothing & real[..., -2]
    return kept


def corrected_as_replay(kept: Tensor, real: Tensor) -> Tensor:
    """The same two cases, once for the first axis of the whole tensor and blind to padding, as RePlay does."""
    kept = kept.clone()
    if torch.equal(kept, real):
        kept[-1] = False
    elif not kept.any():
        kept[-2] = True
    return kept


class TrimTransform(nn.Module):
    """Keeps the last ``seq_len`` columns of the named features (left padding, so the newest events)."""

    def __init__(self, seq_len: int, feature_names: Sequence[str] | str) -> None:
        super().__init__()
        if seq_len < 1:
            raise UserError(f"TrimTransform: seq_len must be positive, not {seq_len}")
        self.seq_len = seq_len
        self.feature_names = [feature_names] if isinstance(feature_names, str) else list(feature_names)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        trimmed = dict(batch)
        for name in self.feature_names:
            feature = require_tensor(batch, name, "TrimTransform")
            if feature.shape[1] < self.seq_len:
                raise UserError(
                    f"TrimTransform: '{name}' has {feature.shape[1]} columns, fewer than {self.seq_len}"
                )
            trimmed[name] = feature[:, -self.seq_len :]
        return trimmed
