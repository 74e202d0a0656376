"""Where a batch's tokens lie in memory, and who sees whom.

Everything position-wise in an encoder runs on ``[T, D]`` without knowing how the tokens are laid out. A jagged layout
holds the real tokens only (T = sum of lengths); a padded one holds whole rectangles (T = B * N, padding included).
Attention asks the layout for groups: rows padded to the longest of the group. Where all is causal a group is cut into steps,
and a row takes part in those that it reaches; where it is not, the rows of a group have similar lengths. The padded layout
is one group of all rows. Both layouts give the same numbers on real tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from .jagged import jagged_to_padded, padded_to_jagged

GROUP_CELLS = 8_000_000
"""Cells of a group's attention matrix (rows times width squared), at most: a bound on memory."""

MAX_WASTE = 0.15
"""Share of the cells that may be padding in a group that is not causal, beyond MIN_ROWS rows."""

MIN_ROWS = 4
"""Rows that share a rectangle whatever their lengths."""

STEP_COST = 40_000
"""What a step of a group costs beside its cells, in cells."""

MAX_CUTS = 25
"""Places where a group may be cut into steps."""


class Step(NamedTuple):
    """Queries start..stop of a group's first ``rows`` rows, against the keys up to stop; other rows end before start."""

    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Group:
    """Rows attended together.

    width: columns n of the group's rectangle.
    tokens: ``[g * n]`` int32, the token behind each cell; cells behind a row's end repeat its last token.
    lengths: ``[g]`` int64, real cells a row.
    rows: ``[g]`` int64, which rows of the batch these are, longest first.
    steps: what a causal attention computes, from the first query to the last.
    """

    width: int
    tokens: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    steps: tuple[Step, ...]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` tokens as the group's rectangle ``[g, n, ...]``."""
        return x.index_select(0, self.tokens).view(-1, self.width, *x.shape[1:])

    def cells(self, heads: int, pitch: int) -> torch.Tensor:
        """``[g * H * n]`` int32: the row that each cell of ``[g, H, n]`` holds, where token t's heads are the rows from
        ``t * pitch`` on.
        """
        if pitch == 1:
            return self.tokens
        if (heads, pitch) not in self._cells:
            head = torch.arange(heads, dtype=torch.int32, device=self.tokens.device)
            first = (self.tokens * pitch).view(-1, 1, self.width)
            self._cells[heads, pitch] = (first + head[:, None]).view(-1)
        return self._cells[heads, pitch]

    @functools.cached_property
    def _cells(self) -> dict[tuple[int, int], torch.Tensor]:
        """What `cells` found: every block of an encoder asks the same."""
        return {}

    def real(self) -> torch.Tensor:
        """``[g, n]`` bool, False behind a row's end."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return columns < self.lengths[:, None]


@dataclass(frozen=True)
class Visibility:
    """Position i of a sequence sees its position j where ``key[j] <= query[i]``; both ``[T]`` int64."""

    key: torch.Tensor
    query: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch of B rows.

    lengths: ``[B]`` int64 on the layout's device.
    max_length: columns N of the padded rectangle.
    positions: ``[T]`` int64, place of a token in its sequence, from 0.
    row_of: ``[T]`` int64, the row a token belongs to.
    groups: rectangles for attention; together they cover every token once.
    ungroup: ``[T]`` int32, the cell of each token in the concatenation of all group rectangles.
    widths: ``[B]`` int32, columns of the group that a row is in.
    valid: ``[T, 1]`` bool for a padded layout, None for a jagged one.
    visibility: None means causal.
    """

    lengths: torch.Tensor
    max_length: int
    positions: torch.Tensor
    row_of: torch.Tensor
    starts: torch.Tensor
    groups: tuple[Group, ...]
    ungroup: torch.Tensor
    widths: torch.Tensor
    valid: torch.Tensor | None = None
    visibility: Visibility | None = None

    @property
    def num_rows(self) -> int:
        return self.lengths.numel()

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def offsets(self) -> torch.Tensor:
        """``[B + 1]`` int64: where each row's tokens begin, and T."""
        return torch.cat([self.starts, self.starts.new_full((1,), self.num_tokens)])

    @property
    def last_tokens(self) -> torch.Tensor:
        """``[B]`` int64: the token at the end of each row (the first one for an empty row of a padded layout)."""
        return self.starts + (self.lengths - 1).clamp(min=0)

    def cells(self, heads: int) -> torch.Tensor:
        """``[T * H]`` int32: where each token and head lies among the cells of all groups' ``[g, H, n]``."""
        if heads == 1:
            return self.ungroup
        if heads not in self._cells:
            place = torch.arange(self.num_tokens, device=self.device) - self.starts[self.row_of]
            first = (self.ungroup - place) * heads + place
            head = torch.arange(heads, device=self.device)
            cells = first[:, None] + head * self.widths[self.row_of][:, None]
            self._cells[heads] = cells.view(-1).to(torch.int32)
        return self._cells[heads]

    @functools.cached_property
    def _cells(self) -> dict[int, torch.Tensor]:
        """What `cells` found: every block of an encoder asks the same."""
        return {}

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` with padding set to 0 (the same tensor where there is none)."""
        return x if self.valid is None else x * self.valid.view(-1, *(1,) * (x.dim() - 1))

    def at_end(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, D]``: what ``x [T, D]`` holds at each row's last token, 0 for a row without tokens."""
        if self.num_tokens == 0:
            return x.new_zeros(self.num_rows, x.shape[1])
        last = x.index_select(0, self.last_tokens.clamp(max=self.num_tokens - 1))
        return last * (self.lengths > 0)[:, None]

    def flatten(self, rectangle: torch.Tensor) -> torch.Tensor:
        """``[B, N, ...]`` to the tokens ``[T, ...]`` of this layout."""
        if self.valid is not None:
            return rectangle.reshape(-1, *rectangle.shape[2:])
        return padded_to_jagged(rectangle, self.offsets, self.num_tokens)

    def to_rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` to ``[B, N, ...]``, right-padded with 0."""
        if self.valid is not None:
            return self.mask(x).view(self.num_rows, self.max_length, *x.shape[1:])
        return jagged_to_padded(x, self.offsets, self.max_length)

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return _moved(self, device)

    def with_visibility(self, visibility: Visibility) -> Layout:
        """The same tokens, not causal; best made before the layout goes to an accelerator."""
        if self.valid is not None:
            return replace(self, visibility=visibility)
        grouped = _grouped(self.lengths.cpu().numpy(), causal=False)
        return replace(self, visibility=visibility, **_moved(grouped, self.device))


def jagged_layout(lengths: torch.Tensor, max_length: int, device: torch.device | None = None) -> Layout:
    """The layout of the real tokens alone.

    lengths: ``[B]`` int64; kept on the CPU by loaders, so that nothing waits for an accelerator.
    """
    device = device or lengths.device
    host = lengths.cpu().numpy().astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(host)[:-1])) if host.size else host
    row_of = np.repeat(np.arange(host.size), host)
    positions = np.arange(row_of.size) - starts[row_of]
    tensors = {"lengths": host, "positions": positions, "row_of": row_of, "starts": starts}
    fields = {name: torch.from_numpy(array) for name, array in tensors.items()} | _grouped(host, causal=True)
    return Layout(max_length=max_length, **_moved(fields, device))


def padded_layout(lengths: torch.Tensor, max_length: int) -> Layout:
    """The layout of whole rectangles ``[B, N]``, padding included; no length is looked at, so that it can be exported."""
    device, rows = lengths.device, lengths.numel()
    steps = _steps(np.full(rows, max_length))
    positions = torch.arange(max_length, device=device).repeat(rows)
    tokens = torch.arange(rows * max_length, dtype=torch.int32, device=device)
    row_of = torch.arange(rows, device=device).repeat_interleave(max_length)
    return Layout(
        lengths=lengths,
        max_length=max_length,
        positions=positions,
        row_of=row_of,
        starts=torch.arange(rows, device=device) * max_length,
        groups=(Group(max_length, tokens, lengths, torch.arange(rows, device=device), steps),),
        ungroup=tokens,
        widths=torch.full((rows,), max_length, dtype=torch.int32, device=device),
        valid=(positions < lengths[row_of])[:, None],
    )


def _moved(value, device: torch.device):
    """Tensors inside frozen dataclasses, tuples and dictionaries, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, Step):
        return value
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, (Group, Visibility, Layout)):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def _grouped(lengths: np.ndarray, causal: bool) -> dict[str, object]:
    """The fields of a jagged layout that say which rows are attended together, on the CPU. lengths: ``[B]`` int64."""
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups, cell_starts, cells, first = [], np.zeros_like(lengths), 0, 0
    widths = np.zeros(lengths.size, np.int32)
    while first < order.size:
        rows = order[first : first + _rows_of_group(lengths[order[first:]], causal)]
        width = int(lengths[rows[0]])
        columns = np.minimum(np.arange(width)[None, :], lengths[rows][:, None] - 1)
        tokens = (starts[rows][:, None] + columns).reshape(-1).astype(np.int32)
        arrays = {"tokens": tokens, "lengths": lengths[rows], "rows": rows}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        groups.append(Group(width, steps=_steps(lengths[rows]), **tensors))
        widths[rows] = width
        cell_starts[rows] = cells + np.arange(rows.size) * width
        cells += tokens.size
        first += rows.size
    ungroup = np.repeat(cell_starts - starts, lengths) + np.arange(lengths.sum())
    return {
        "groups": tuple(groups),
        "ungroup": torch.from_numpy(ungroup.astype(np.int32)),
        "widths": torch.from_numpy(widths),
    }


def _rows_of_group(lengths: np.ndarray, causal: bool) -> int:
    """How many rows, from the longest on, share a rectangle: as many as memory allows and, where every cell of a rectangle
    is computed, waste little.
    """
    width = int(lengths[0])
    fits = max(MIN_ROWS, GROUP_CELLS // width**2)
    if causal:
        return min(fits, lengths.size)
    used = np.cumsum(lengths[:fits])
    thrifty = used >= (1.0 - MAX_WASTE) * width * np.arange(1, used.size + 1)
    return max(MIN_ROWS, int(np.flatnonzero(thrifty)[-1]) + 1)


def _steps(lengths: np.ndarray) -> tuple[Step, ...]:
    """Cuts a group whose rows have these lengths, longest first, so that cells and steps cost least (a shortest path)."""
    if not lengths.size:
        return ()
    width = int(lengths[0])
    cuts = np.append(np.arange(0, width, -(-width // MAX_CUTS)), width)
    reaching = np.searchsorted(-lengths, -cuts)
    least, before = np.zeros(cuts.size), np.zeros(cuts.size, np.int64)
    for i in range(1, cuts.size):
        costs = least[:i] + reaching[:i] * (cuts[i] - cuts[:i]) * cuts[i] + STEP_COST
        before[i] = costs.argmin()
        least[i] = costs[before[i]]
    steps, i = [], cuts.size - 1
    while i:
        start = before[i]
        steps.append(Step(int(cuts[start]), int(cuts[i]), int(reaching[start])))
        i = start
    return tuple(reversed(steps))
