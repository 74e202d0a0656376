"""Batch transforms: modules from one batch (a mapping of tensors) to a new one.

A transform never changes the caller's mapping or tensors; the result may share storage with them. Columns
that a transform does not name pass through. Rectangles are right-padded with id 0, and ``lengths [B]``
int64 counts the real events of a row (shape legend: ``features.py``). Groups are mappings inside the batch.

A sequence of transforms is a ``torch.nn.Sequential``; ``default_sasrec_transforms`` builds the ones that
training runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generative_recommenders.data.token_masks import draw_token_mask
from generative_recommenders.errors import UserError

TensorBatch = Mapping[str, Any]
"""Names to tensors, or to groups (mappings of names to tensors)."""

MASK_OPERATIONS = {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}

EVENT_COLUMNS: dict[str, str] = {"item_ids": "ids", "ratings": "ratings", "timestamps": "timestamps"}
"""The loader's ``[B, N]`` columns, each with the stem of its later names (``past_ids``, ``target_ids``)."""


def require(batch: TensorBatch, name: str, who: str) -> Any:
    """``batch[name]``; a missing name is a ``UserError`` that lists the columns present."""
    if name not in batch:
        known = ", ".join(map(str, batch)) or "none"
        raise UserError(f"{who}: the batch has no column '{name}'; its columns: {known}")
    return batch[name]


def require_tensor(batch: TensorBatch, name: str, who: str) -> Tensor:
    """``batch[name]``; a missing name, a group or anything else that is no tensor is a ``UserError``."""
    value = require(batch, name, who)
    if not isinstance(value, Tensor):
        what = "a group of columns" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UserError(f"{who}: '{name}' must be a tensor, not {what}")
    return value


class Copy(nn.Module):
    """Adds independent, detached copies of columns under new names.

    mapping: existing name -> name of the copy. Raises ``UserError`` where a name is missing or a group.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        super().__init__()
        self.mapping = dict(mapping)

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        copies = {
            new: require_tensor(batch, old, "Copy").detach().clone() for old, new in self.mapping.items()
        }
        return {**batch, **copies}


class Rename(nn.Module):
    """Renames columns; every other column stays, in its place.

    mapping: existing name -> new name. ``missing_ok``: absent names are skipped instead of refused.
    Raises ``UserError`` where a name is missing or a new name would overwrite another column.
    """

    def __init__(self, mapping: Mapping[str, str], missing_ok: bool = False) -> None:
        super().__init__()
        self.mapping = dict(mapping)
        self.missing_ok = missing_ok

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        if not self.missing_ok:
            for name in self.mapping:
                require(batch, name, "Rename")
        renamed = {self.mapping.get(name, name): value for name, value in batch.items()}
        if len(renamed) < len(batch):
            raise UserError(
                f"Rename: {self.mapping} would overwrite a column of the batch ({', '.join(batch)})"
            )
        return renamed


class Group(nn.Module):
    """Moves columns into groups: ``{"features": ["a", "b"]}`` puts a and b into ``batch["features"]``.

    A column may be in several groups. ``missing_ok``: absent names are skipped instead of refused
    (``UserError``).
    """

    def __init__(self, mapping: Mapping[str, Sequence[str]], missing_ok: bool = False) -> None:
        super().__init__()
        self.mapping = {group: list(names) for group, names in mapping.items()}
        self.missing_ok = missing_ok

    def _members(self, batch: TensorBatch, names: Sequence[str]) -> dict[str, Any]:
        wanted = [name for name in names if name in batch or not self.missing_ok]
        return {name: require(batch, name, "Group") for name in wanted}

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        groups = {group: self._members(batch, names) for group, names in self.mapping.items()}
        moved = {name for names in self.mapping.values() for name in names}
        kept = {name: value for name, value in batch.items() if name not in moved}
        clash = sorted(set(groups) & set(kept))
        if clash:
            raise UserError(
                f"Group: '{clash[0]}' is already a column of the batch; choose another group name"
            )
        return {**kept, **groups}


class Unsqueeze(nn.Module):
    """Inserts a dimension of size one at ``dim`` of one column (a view). Missing column: ``UserError``."""

    def __init__(self, column_name: str, dim: int) -> None:
        super().__init__()
        self.column_name = column_name
        self.dim = dim

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        column = require_tensor(batch, self.column_name, "Unsqueeze")
        return {**batch, self.column_name: column.unsqueeze(self.dim)}


class Select(nn.Module):
    """Keeps only the named columns; ``("group", "name")`` names a column inside a group, which stays a group.

    Missing names are refused (``UserError``).
    """

    def __init__(self, feature_names: Sequence[str | tuple[str, ...]]) -> None:
        super().__init__()
        self.paths = [(name,) if isinstance(name, str) else tuple(name) for name in feature_names]
        for path in self.paths:
            if len(path) not in (1, 2):
                raise UserError(f"Select: {path} must be a name or a pair (group, name)")

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        selected: dict[str, Any] = {}
        for name, *inner in self.paths:
            column = require(batch, name, "Select")
            if inner:
                selected[name] = {
                    **selected.get(name, {}),
                    inner[0]: require(column, inner[0], f"Select in '{name}'"),
                }
            else:
                selected[name] = column
        return selected


class EqualityMask(nn.Module):
    """Combines a bool mask with "this feature has this value": ``mask <- mask op (feature == value)``.

    feature_name: column of the mask's shape. equality_value: the value looked for. mode: "and", "or" or
    "xor". mask_name: bool column that is replaced by the result. Raises ``UserError`` for an unknown mode
    or missing columns.
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
            raise UserError(f"EqualityMask: unknown mode '{mode}'; known: {', '.join(MASK_OPERATIONS)}")
        self.feature_name = feature_name
        self.equality_value = equality_value
        self.mode = mode
        self.mask_name = mask_name

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        mask = require_tensor(batch, self.mask_name, "EqualityMask")
        equal = require_tensor(batch, self.feature_name, "EqualityMask") == self.equality_value
        return {**batch, self.mask_name: MASK_OPERATIONS[self.mode](mask, equal)}


class SequenceRoll(nn.Module):
    """Rolls one column along axis 1 by ``roll`` and fills the freed places with ``padding_value``."""

    def __init__(self, field_name: str, roll: int = -1, padding_value: int = 0) -> None:
        super().__init__()
        self.field_name = field_name
        self.roll = roll
        self.padding_value = padding_value

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        column = require_tensor(batch, self.field_name, "SequenceRoll")
        rolled = column.roll(self.roll, dims=1)
        freed = slice(0, self.roll) if self.roll > 0 else slice(column.shape[1] + self.roll, None)
        if abs(self.roll) >= column.shape[1]:
            freed = slice(None)
        if self.roll != 0:
            rolled[:, freed] = self.padding_value
        return {**batch, self.field_name: rolled}


class Trim(nn.Module):
    """Keeps the last ``seq_len`` real events of every row, right-padded, and limits the lengths to match.

    columns: ``[B, N, ...]`` columns; absent ones are skipped. lengths: name of the ``[B]`` lengths. Batches
    that are no wider than ``seq_len`` pass unchanged. Raises ``UserError`` where ``seq_len`` is below 1 or
    lengths are missing.
    """

    def __init__(
        self, seq_len: int, columns: Sequence[str] = tuple(EVENT_COLUMNS), lengths: str = "lengths"
    ) -> None:
        super().__init__()
        if seq_len < 1:
            raise UserError(f"Trim: seq_len must be at least 1, not {seq_len}")
        self.seq_len = seq_len
        self.columns = list(columns)
        self.lengths = lengths

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        lengths = require(batch, self.lengths, "Trim")
        wide = {
            name: batch[name]
            for name in self.columns
            if name in batch and batch[name].shape[1] > self.seq_len
        }
        if not wide:
            return dict(batch)
        first = (lengths - self.seq_len).clamp(min=0)
        places = first[:, None] + torch.arange(self.seq_len, device=lengths.device)
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        trimmed = {name: column[rows, places] for name, column in wide.items()}
        return {**batch, **trimmed, self.lengths: lengths.clamp(max=self.seq_len)}


class NextToken(nn.Module):
    """Splits histories ``[B, N + shift]`` into what is seen and what is to be predicted.

    For every column ``c`` with stem ``s`` in ``columns`` (absent ones are skipped): ``past_s [B, N]`` holds
    the events before the last ``shift`` ones (0 behind them) and ``target_s [B, N]`` the event ``shift``
    places after each of them (0 where there is none). ``lengths`` becomes ``past_lengths [B]`` = lengths -
    shift, at least 0. The split columns and ``lengths`` leave the batch; every other column stays.

    Raises ``UserError`` where ``shift`` is below 1, lengths are missing or a rectangle has no more than
    ``shift`` columns.
    """

    def __init__(
        self,
        shift: int = 1,
        columns: Mapping[str, str] | None = None,
        lengths: str = "lengths",
        out: str = "past_lengths",
    ) -> None:
        super().__init__()
        if shift < 1:
            raise UserError(f"NextToken: shift must be at least 1, not {shift}")
        self.shift = shift
        self.columns = dict(EVENT_COLUMNS if columns is None else columns)
        self.lengths = lengths
        self.out = out

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        past_lengths = (require(batch, self.lengths, "NextToken") - self.shift).clamp(min=0)
        out = {
            name: value for name, value in batch.items() if name not in self.columns and name != self.lengths
        }
        out[self.out] = past_lengths
        behind: Tensor | None = None
        for name in filter(batch.__contains__, self.columns):
            column, stem = batch[name], self.columns[name]
            width = column.shape[1] - self.shift
            if width < 1:
                raise UserError(
                    f"NextToken: '{name}' has {column.shape[1]} columns, needs more than shift={self.shift}"
                )
            if behind is None or behind.shape[1] != width:
                behind = torch.arange(width, device=column.device) >= past_lengths[:, None]
            hidden = behind.reshape(behind.shape + (1,) * (column.dim() - 2))
            out[f"past_{stem}"] = column[:, :width].masked_fill(hidden, 0)
            out[f"target_{stem}"] = column[:, self.shift :]
        return out


class LastTarget(nn.Module):
    """Adds ``out [B]``: the value of ``column [B, N]`` at each row's last real position (0 for an empty row).

    With the default names, the time of the event that follows the history. Skipped where the column is
    absent.
    """

    def __init__(
        self, column: str = "target_timestamps", out: str = "next_timestamps", lengths: str = "past_lengths"
    ) -> None:
        super().__init__()
        self.column = column
        self.out = out
        self.lengths = lengths

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        if self.column not in batch:
            return dict(batch)
        lengths = require(batch, self.lengths, "LastTarget")
        last = batch[self.column].gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return {**batch, self.out: last.masked_fill(lengths == 0, 0)}


class TokenMask(nn.Module):
    """Chooses positions to hide, as in masked language modelling (BERT4Rec, arXiv 1904.06690, section 3.6).

    ``column`` is a bool mask of real positions, or ids (real where not 0), ``[B, N]`` or ``[N]``. The
    result ``out`` has its shape, True = hidden. Each real position is hidden with ``probability``, drawn
    per row and position; every row with two or more real positions has at least one hidden and at least one
    visible; a row with one has none hidden, and padding never is. ``shared_mask``: one row of draws serves
    the whole batch.
    """

    def __init__(
        self,
        column: str = "item_ids",
        out: str = "masked",
        probability: float = 0.15,
        generator: torch.Generator | None = None,
        shared_mask: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise UserError(f"TokenMask: probability must be between 0 and 1, not {probability}")
        self.column = column
        self.out = out
        self.probability = probability
        self.generator = generator
        self.shared_mask = shared_mask

    def forward(self, batch: TensorBatch) -> dict[str, Any]:
        real = require_tensor(batch, self.column, "TokenMask") != 0
        return {**batch, self.out: draw_token_mask(real, self.probability, self.generator, self.shared_mask)}


def default_sasrec_transforms(
    max_sequence_length: int | None = None, extra_columns: Mapping[str, str] | None = None
) -> dict[str, nn.Sequential]:
    """The transforms that training and evaluation run: ``{"train", "validation", "test", "predict"}``.

    Train takes the loader's ``{user_ids, lengths [B], item_ids [B, N+1], ratings?, timestamps?}`` to
    ``{user_ids, past_lengths [B], past_ids [B, N], past_ratings?, past_timestamps?, target_ids [B, N] (0
    where none), target_ratings?, target_timestamps?, next_timestamps? [B]}``. The other three rename
    ``item_ids [B, N]`` and its companions to ``past_*`` and keep the rest (``target_ids [B]``,
    ``next_timestamps [B]``, ...).

    max_sequence_length: also cuts histories to their last so many events (the loader has usually done so).
    extra_columns: further ``[B, N]`` columns to treat like ratings, name -> stem.
    """
    columns = {**EVENT_COLUMNS, **(extra_columns or {})}

    def trim(extra: int) -> list[nn.Module]:
        return [] if max_sequence_length is None else [Trim(max_sequence_length + extra, list(columns))]

    def evaluation() -> nn.Sequential:
        names = {name: f"past_{stem}" for name, stem in columns.items()}
        return nn.Sequential(*trim(0), Rename({**names, "lengths": "past_lengths"}, missing_ok=True))

    return {
        "train": nn.Sequential(*trim(1), NextToken(columns=columns), LastTarget()),
        "validation": evaluation(),
        "test": evaluation(),
        "predict": evaluation(),
    }


def default_two_tower_transforms(
    max_sequence_length: int | None = None, extra_columns: Mapping[str, str] | None = None
) -> dict[str, nn.Sequential]:
    """Like ``default_sasrec_transforms``: the query tower reads histories, item features come by item id."""
    return default_sasrec_transforms(max_sequence_length, extra_columns)
