"""RePlay's transforms, by their documented names, arguments and defaults: modules from one batch to a new one.

Conventions are RePlay's: ids 0..cardinality-1, padding id = cardinality, rows padded on the left, masks True = kept.
Differences on purpose: a batch is never changed in place (the result may share storage with it), a missing column is
one clear ``UserError``, and masks are drawn per user. Columns that a transform does not name pass through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generative_recommenders.data.list_columns import require_columns
from generative_recommenders.data.token_masks import uniform
from generative_recommenders.errors import UserError

__all__ = [
    "CopyTransform",
    "EqualityMaskTransform",
    "GroupTransform",
    "MultiClassNegativeSamplingTransform",
    "NextTokenTransform",
    "RenameTransform",
    "SelectTransform",
    "SequenceRollTransform",
    "TokenMaskTransform",
    "TrimTransform",
    "UniformNegativeSamplingTransform",
    "UnsqueezeTransform",
]

MASK_OPERATIONS = {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}
MULTINOMIAL_LIMIT = 2**24
"""torch.multinomial takes at most this many categories."""
TensorBatch = Mapping[str, Any]
"""Names to tensors, or to groups (mappings of names to tensors)."""


def require(batch: TensorBatch, name: str, who: str) -> Any:
    """``batch[name]``; a missing name is a ``UserError`` that lists the columns present."""
    require_columns(list(batch), [name], f"{who}: the batch")
    return batch[name]


def require_tensor(batch: TensorBatch, name: str, who: str) -> Tensor:
    """``batch[name]``; a missing name, a group or anything else that is no tensor is a ``UserError``."""
    value = require(batch, name, who)
    if not isinstance(value, Tensor):
        what = "a group of columns" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UserError(f"{who}: '{name}' must be a tensor, not {what}")
    return value


class Transform(nn.Module):
    """One batch to a new one. Most are dataclasses, whose fields are the documented arguments."""

    # torch's containers tell modules apart by identity and print them their own way: hence eq=False, repr=False below.
    def __post_init__(self) -> None:
        super().__init__()

    def error(self, message: str) -> UserError:
        return UserError(f"{type(self).__name__}: {message}")

    def tensor(self, batch: TensorBatch, name: str) -> Tensor:
        return require_tensor(batch, name, type(self).__name__)

    def sequences(self, batch: TensorBatch, name: str, at_least: int = 0) -> Tensor:
        """A column ``[B, L, ...]`` of the batch; ``UserError`` where it has no second axis or L is less than asked."""
        column = self.tensor(batch, name)
        if column.dim() < 2 or column.shape[1] < at_least:
            raise self.error(f"'{name}' {tuple(column.shape)} must be [B, L], with L at least {at_least}")
        return column


@dataclass(eq=False, repr=False)
class CopyTransform(Transform):
    """Adds independent, detached copies of columns, by a mapping of existing names to the copies' names."""

    mapping: Mapping[str, str]

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        copies = {new: self.tensor(batch, old).detach().clone() for old, new in self.mapping.items()}
        return {**batch, **copies}


@dataclass(eq=False, repr=False)
class RenameTransform(Transform):
    """Renames columns, by a mapping of existing to new names; ``UserError`` where that would overwrite another one."""

    mapping: Mapping[str, str]

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        require_columns(list(batch), list(self.mapping), "RenameTransform: the batch")
        renamed = {self.mapping.get(name, name): value for name, value in batch.items()}
        if len(renamed) < len(batch):
            raise self.error(f"{self.mapping} would overwrite a column of the batch ({', '.join(batch)})")
        return renamed


@dataclass(eq=False, repr=False)
class GroupTransform(Transform):
    """Moves columns into groups: ``{"features": ["a", "b"]}`` puts a and b into ``batch["features"]``.

    A column may be in several groups; names that the batch lacks are skipped. ``UserError`` where a group has the name
    of a column that stays.
    """

    mapping: Mapping[str, Sequence[str]]

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        moved = {name for names in self.mapping.values() for name in names}
        grouped = {name: value for name, value in batch.items() if name not in moved}
        for group, names in self.mapping.items():
            if group in grouped:
                raise self.error(f"'{group}' is already a column of the batch; choose another group name")
            grouped[group] = {name: batch[name] for name in names if name in batch}
        return grouped


@dataclass(eq=False, repr=False)
class UnsqueezeTransform(Transform):
    """Inserts a dimension of size one at ``dim`` of one column (a view)."""

    column_name: str
    dim: int

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        return {**batch, self.column_name: self.tensor(batch, self.column_name).unsqueeze(self.dim)}


@dataclass(eq=False, repr=False)
class SelectTransform(Transform):
    """Keeps only the named columns; ``("group", "name")`` names a column inside a group, which stays a group."""

    feature_names: Sequence[str | tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paths = [(name,) if isinstance(name, str) else tuple(name) for name in self.feature_names]
        for path in self.paths:
            if len(path) not in (1, 2):
                raise self.error(f"{path} must be a name or a pair (group, name)")

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selected: dict[str, Any] = {}
        for name, *inner in self.paths:
            column = require(batch, name, "SelectTransform")
            if inner and not isinstance(column, Mapping):
                raise self.error(f"'{name}' is no group of columns")
            parts = {each: require(column, each, f"SelectTransform in '{name}'") for each in inner}
            selected[name] = {**selected.get(name, {}), **parts} if parts else column
        return selected


@dataclass(eq=False, repr=False)
class EqualityMaskTransform(Transform):
    """Combines a bool mask with "this feature has this value": ``mask <- mask op (feature == value)``.

    feature_name: column of the mask's shape. mask_name: bool column that is replaced by the result.
    """

    feature_name: str
    equality_value: float | bool
    mode: Literal["and", "or", "xor"] = "and"
    mask_name: str = "target_padding_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MASK_OPERATIONS:
            raise self.error(f"unknown mode '{self.mode}'; known: {', '.join(MASK_OPERATIONS)}")

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        mask = self.tensor(batch, self.mask_name)
        equal = self.tensor(batch, self.feature_name) == self.equality_value
        return {**batch, self.mask_name: MASK_OPERATIONS[self.mode](mask, equal)}


@dataclass(eq=False, repr=False)
class SequenceRollTransform(Transform):
    """Rolls one column along axis 1 by ``roll`` and fills the freed places with ``padding_value``."""

    field_name: str
    roll: int = -1
    padding_value: int = 0

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        column = self.sequences(batch, self.field_name)
        rolled = column.roll(self.roll, dims=1)
        source = torch.arange(column.shape[1], device=column.device) - self.roll
        rolled[:, (source < 0) | (source >= column.shape[1])] = self.padding_value
        return {**batch, self.field_name: rolled}


@dataclass(eq=False, repr=False)
class NextTokenTransform(Transform):
    """Adds labels shifted by ``shift`` and cuts the last ``shift`` columns off every other sequence.

    label_field: the column to predict, ``[B, L + shift]``; its mask is ``label_field + mask_postfix``. Every tensor of
    two or more dimensions, groups included, except ``query_features`` loses its last ``shift`` columns;
    ``out_feature_name`` and ``out_feature_name + mask_postfix`` are added, ``[B, L]``. ``UserError`` where L is 0.
    """

    label_field: str
    shift: int = 1
    query_features: Sequence[str] | str = ("query_id", "query_id_mask")
    out_feature_name: str = "positive_labels"
    mask_postfix: str = "_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift < 1:
            raise self.error(f"shift must be at least 1, not {self.shift}")
        if isinstance(self.query_features, str):
            self.query_features = (self.query_features,)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        labels = self.sequences(batch, self.label_field, at_least=self.shift + 1)
        mask = self.tensor(batch, self.label_field + self.mask_postfix)
        return {
            **self.shortened(batch),
            self.out_feature_name: labels[:, self.shift :],
            self.out_feature_name + self.mask_postfix: mask[:, self.shift :],
        }

    def shortened(self, batch: TensorBatch) -> dict[str, Any]:
        shorter = dict(batch)
        for name, value in batch.items():
            if name in self.query_features:
                continue
            if isinstance(value, Mapping):
                shorter[name] = self.shortened(value)
            elif self.tensor(batch, name).dim() > 1:
                shorter[name] = value[:, : -self.shift]
        return shorter


@dataclass(eq=False, repr=False)
class TokenMaskTransform(Transform):
    """Adds a mask of kept tokens: real ones (``token_field`` True) whose uniform draw is at least ``mask_prob``.

    token_field: bool ``[L]`` or ``[B, L]``, True = real, padded on the left. A row that would keep everything hides its
    last element; one that would keep nothing keeps the element before it, where that is real.
    shared_mask: draw one row for the whole batch and correct those two cases on the whole tensor (its last row, for
    ``[B, L]``), padding or not, exactly as RePlay does. By default draws are per user, and padding is never kept.
    """

    token_field: str
    out_feature_name: str = "token_mask"
    mask_prob: float = 0.15
    generator: torch.Generator | None = None
    shared_mask: bool = field(default=False, kw_only=True)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        real = self.tensor(batch, self.token_field)
        shape = real.shape[-1:] if self.shared_mask else real.shape
        kept = (uniform(shape, real.device, self.generator) * real >= self.mask_prob) & real
        if self.shared_mask and torch.equal(kept, real):
            kept[-1] = False
        elif self.shared_mask and not kept.any():
            kept[-2] = True
        elif not self.shared_mask:
            everything = (kept == real).all(-1)
            nothing = ~kept.any(-1) & ~everything
            kept[..., -1] &= ~everything
            if kept.shape[-1] > 1:
                kept[..., -2] |= nothing & real[..., -2]
        return {**batch, self.out_feature_name: kept}


@dataclass(eq=False, repr=False)
class TrimTransform(Transform):
    """Keeps the last ``seq_len`` columns of the named features (left padding, so the newest events)."""

    seq_len: int
    feature_names: Sequence[str] | str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len < 1:
            raise self.error(f"seq_len must be positive, not {self.seq_len}")
        if isinstance(self.feature_names, str):
            self.feature_names = (self.feature_names,)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        trimmed = dict(batch)
        for name in self.feature_names:
            trimmed[name] = self.sequences(batch, name, at_least=self.seq_len)[:, -self.seq_len :]
        return trimmed


class NegativeSampling(Transform):
    """Distinct negatives by weights ``[..., V]``; items of weight 0 are never drawn."""

    weights: Tensor

    def __init__(
        self, weights: Tensor, num_negatives: int, out_feature_name: str, generator: torch.Generator | None
    ) -> None:
        super().__post_init__()
        if num_negatives < 1:
            raise self.error(f"the number of negatives must be at least 1, not {num_negatives}")
        if weights.shape[-1] > MULTINOMIAL_LIMIT:
            raise self.error(f"{weights.shape[-1]} items are too many to weigh; use the objectives' samplers instead")
        weights = weights.float()
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise self.error("weights must be finite and not negative")
        available = int((weights > 0).sum(-1).min())
        if available < num_negatives:
            raise self.error(f"{num_negatives} distinct negatives asked of a pool of {available} items; ask for fewer")
        self.register_buffer("weights", weights, persistent=False)
        self.num_negatives, self.out, self.generator = num_negatives, out_feature_name, generator

    def drawn(self) -> Tensor:
        """``[..., num_negatives]`` int64, places of the weights."""
        return torch.multinomial(self.weights, self.num_negatives, generator=self.generator)


class UniformNegativeSamplingTransform(NegativeSampling):
    """Adds ``num_negative_samples`` distinct ids ``[R]`` int64 of 0..cardinality-1, one vector for the batch.

    Draws are not compared with the positives: losses mask collisions. ``UserError`` for a pool that is too small.

    sample_distribution: ``[cardinality]`` weights, equal if None.
    generator: on the weights' device; None is torch's default one.
    """

    pool: Tensor

    def __init__(
        self,
        cardinality: int,
        num_negative_samples: int,
        *,
        out_feature_name: str = "negative_labels",
        sample_distribution: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        weights = torch.ones(cardinality) if sample_distribution is None else sample_distribution
        if weights.shape != (cardinality,):
            raise self.error(f"weights have shape {tuple(weights.shape)}, expected one per item: ({cardinality},)")
        super().__init__(weights, num_negative_samples, out_feature_name, generator)
        # A zero among the weights would change which items a generator draws.
        self.register_buffer("pool", self.weights.nonzero()[:, 0], persistent=False)
        self.weights = self.weights[self.pool]

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        return {**batch, self.out: self.pool[self.drawn()]}


class MultiClassNegativeSamplingTransform(NegativeSampling):
    """Adds ``[B, num_negative_samples]`` distinct ids of 0..cardinality-1, drawn for the class that a row's selector
    names.

    sample_mask: ``[classes, cardinality]`` weights or indicators. One set of ids is drawn per class and batch; row b
    receives that of class ``batch[negative_selector_name][b]``. ``UserError`` for a class with fewer items than
    negatives, and for a selector outside the classes.
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
        if sample_mask.dim() != 2 or not len(sample_mask):
            wrong = "has no classes" if sample_mask.dim() == 2 else f"is {list(sample_mask.shape)}"
            raise self.error(f"sample_mask {wrong}: give weights [classes, items]")
        super().__init__(sample_mask, num_negative_samples, out_feature_name, generator)
        self.selector = negative_selector_name

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selector = self.tensor(batch, self.selector)
        classes = len(self.weights)
        if selector.numel() and not 0 <= int(selector.min()) <= int(selector.max()) < classes:
            raise self.error(f"'{self.selector}' must be between 0 and {classes - 1}")
        return {**batch, self.out: self.drawn()[selector]}
