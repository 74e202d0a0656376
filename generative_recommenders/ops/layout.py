"""Layouts of a batch: the order of its tokens in memory, and its attention mask.

Everything position-wise in an encoder runs on ``[T, D]`` without knowing how the tokens are laid out. A jagged layout
holds the real tokens only (T = sum of lengths); a padded one holds whole rectangles (T = B * N, padding included).
Attention asks the layout for groups: rows padded to the longest of the group. Where all is causal a group is cut into steps,
and a row takes part in those that it reaches; where it is not, the rows of a group have similar lengths. The padded layout
is one group of all rows. Both layouts give the same numbers on real tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from generative_recommenders.ops.jagged import jagged_to_padded, padded_to_jagged, row_positions
from generative_recommenders.ops.rectangles import Places, Rectangles, places, places_of_all

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
    keys: one rectangle ``[g, n]``.
    queries: a rectangle for each step, or the same as the keys where not all is causal.
    lengths: ``[g]`` int64, real cells a row.
    rows: ``[g]`` int64, which rows of the batch these are, longest first.
    steps: what a causal attention computes, from the first query to the last.
    """

    width: int
    keys: Rectangles
    queries: Rectangles
    lengths: torch.Tensor
    rows: torch.Tensor
    steps: tuple[Step, ...]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` tokens as the group's rectangle ``[g, n, ...]``."""
        return x.index_select(0, self.keys.tokens).view(-1, self.width, *x.shape[1:])

    def real(self) -> torch.Tensor:
        """``[g, n]`` bool, False behind a row's end."""
        return self.keys.real.view(-1, self.width)


@dataclass(frozen=True)
class AttentionMask:
    """Position i of a sequence sees its position j where ``key[j] <= query[i]``; both ``[T]`` int64."""

    key: torch.Tensor
    query: torch.Tensor


class Grouping(NamedTuple):
    """Rectangles for attention, which together cover every token once, and where the tokens lie among the keys and among the
    queries of all groups."""

    groups: tuple[Group, ...]
    keys: Places
    queries: Places


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch of B rows.

    lengths: ``[B]`` int64 on the layout's device.
    max_length: columns N of the padded rectangle.
    positions: ``[T]`` int64, place of a token in its sequence, from 0.
    row_of: ``[T]`` int64, the row a token belongs to.
    starts: ``[B]`` int64, each row's first token.
    host_lengths: the lengths on the CPU; None for a padded layout and one made on a device.
    valid: ``[T, 1]`` bool for a padded layout, None for a jagged one.
    attention_mask: None means causal.
    """

    lengths: torch.Tensor
    max_length: int
    positions: torch.Tensor
    row_of: torch.Tensor
    starts: torch.Tensor
    host_lengths: np.ndarray | None = None
    valid: torch.Tensor | None = None
    attention_mask: AttentionMask | None = None

    @functools.cached_property
    def grouping(self) -> Grouping:
        """Made when it is first asked for: the kernels of a GPU need none."""
        if self.valid is not None:
            return _one_group(self)
        host = self.lengths.cpu().numpy() if self.host_lengths is None else self.host_lengths
        return moved(_grouped(host, causal=self.attention_mask is None), self.device)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.grouping.groups

    @property
    def keys(self) -> Places:
        return self.grouping.keys

    @property
    def queries(self) -> Places:
        return self.grouping.queries

    @property
    def longest(self) -> int:
        """Tokens of the longest row, or a number that is no less."""
        return self.max_length if self.host_lengths is None else int(self.host_lengths.max(initial=0))

    @property
    def num_rows(self) -> int:
        return self.lengths.numel()

    @property
    def num_tokens(self) -> int:
        return self.positions.numel()

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        """``[B + 1]`` int64: where each row's tokens begin, and T."""
        return torch.cat([self.starts, self.starts.new_full((1,), self.num_tokens)])

    @property
    def last_tokens(self) -> torch.Tensor:
        """``[B]`` int64: the token at the end of each row (the first one for an empty row of a padded layout)."""
        return self.starts + (self.lengths - 1).clamp(min=0)

    @functools.cached_property
    def memo(self) -> dict[str | int, object]:
        """What was made of the layout once for all blocks of an encoder."""
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
        if rectangle.dim() > 2:
            return padded_to_jagged(rectangle, self.offsets, self.num_tokens)
        return rectangle.flatten().index_select(0, self._cells(rectangle.shape[1]))

    def _cells(self, columns: int) -> torch.Tensor:
        """``[T]`` int64: where the tokens lie in a rectangle of so many columns."""
        if (
            columns not in self.memo
        ):  # one conversion, of the cells' numbers; every column of events is then a plain gather
            cells = torch.arange(self.num_rows * columns, device=self.device).view(self.num_rows, columns)
            self.memo[columns] = padded_to_jagged(cells, self.offsets, self.num_tokens)
        return cast(torch.Tensor, self.memo[columns])

    def to_rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` to ``[B, N, ...]``, right-padded with 0."""
        if self.valid is not None:
            return self.mask(x).view(self.num_rows, self.max_length, *x.shape[1:])
        return jagged_to_padded(x, self.offsets, self.max_length)

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return moved(self, device)

    def with_attention_mask(self, attention_mask: AttentionMask) -> Layout:
        """The same tokens, not causal."""
        return replace(self, attention_mask=attention_mask)


def jagged_layout(lengths: torch.Tensor, max_length: int, device: torch.device | None = None) -> Layout:
    """The layout of the real tokens alone.

    lengths: ``[B]`` int64; kept on the CPU by loaders, so that nothing waits for an accelerator.
    """
    device = device or lengths.device
    host = lengths.cpu().numpy().astype(np.int64)
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(host))))
    fields = {
        "lengths": torch.from_numpy(host),
        "positions": row_positions(offsets, int(offsets[-1])),
        "row_of": torch.from_numpy(np.repeat(np.arange(host.size), host)),
        "starts": offsets[:-1],
    }
    return Layout(max_length=max_length, host_lengths=host, **moved(fields, device))


def device_layout(lengths: torch.Tensor, max_length: int, num_tokens: int) -> Layout:
    """`jagged_layout` of lengths on an accelerator whose sum is known: nothing waits for it, but for groups."""
    ends = lengths.cumsum(0)
    starts = ends - lengths
    rows = torch.arange(len(lengths), device=lengths.device)
    row_of = rows.repeat_interleave(lengths, output_size=num_tokens)
    positions = torch.arange(num_tokens, device=lengths.device) - starts[row_of]
    return Layout(lengths, max_length, positions, row_of, starts)


def padded_layout(lengths: torch.Tensor, max_length: int) -> Layout:
    """The layout of whole rectangles ``[B, N]``, padding included; no length is looked at, so that it can be exported."""
    device, rows = lengths.device, lengths.numel()
    positions = torch.arange(max_length, device=device).repeat(rows)
    row_of = torch.arange(rows, device=device).repeat_interleave(max_length)
    valid = (positions < lengths[row_of]).view(-1, 1)
    return Layout(
        lengths, max_length, positions, row_of, torch.arange(rows, device=device) * max_length, valid=valid
    )


def _one_group(layout: Layout) -> Grouping:
    """The rectangle of a padded layout, cut into steps where all is causal."""
    assert layout.valid is not None
    rows, width, device = layout.num_rows, layout.max_length, layout.device
    steps = _steps(np.full(rows, width))
    tokens = torch.arange(rows * width, dtype=torch.int32, device=device).view(rows, width)
    valid = layout.valid.view(rows, width)
    keys = _cut(tokens, valid, _whole(rows, width))
    queries = keys if layout.attention_mask is not None else _cut(tokens, valid, steps)
    group = Group(width, keys, queries, layout.lengths, torch.arange(rows, device=device), steps)
    key_places = places_of_all(keys)
    return Grouping((group,), key_places, key_places if queries is keys else places_of_all(queries))


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors inside (nested) dataclasses, tuples and dictionaries on another device; copies from pinned memory
    do not wait."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def _grouped(lengths: np.ndarray, causal: bool) -> Grouping:
    """Which rows of a jagged layout are attended together, on the CPU. lengths: ``[B]`` int64."""
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups: list[Group] = []
    first = 0
    while first < order.size:
        rows = order[first : first + _rows_of_group(lengths[order[first:]], causal)]
        own, width = lengths[rows], int(lengths[rows[0]])
        columns = np.arange(width)
        tokens = (starts[rows][:, None] + np.minimum(columns, own[:, None] - 1)).astype(np.int32)
        cells = torch.from_numpy(tokens), torch.from_numpy(columns < own[:, None])
        steps, keys = _steps(own), _cut(*cells, _whole(*tokens.shape))
        queries = _cut(*cells, steps) if causal else keys
        groups.append(Group(width, keys, queries, torch.from_numpy(own), torch.from_numpy(rows), steps))
        first += rows.size
    found = places([group.keys for group in groups], int(lengths.sum()))
    queried = places([group.queries for group in groups], int(lengths.sum())) if causal else found
    return Grouping(tuple(groups), found, queried)


def _whole(rows: int, columns: int) -> tuple[Step, ...]:
    return (Step(0, columns, rows),)


def _cut(tokens: torch.Tensor, real: torch.Tensor, steps: tuple[Step, ...]) -> Rectangles:
    """The parts of a group's ``tokens [g, n]`` that are queries of its steps; real: ``[g, n]``."""
    cut = [torch.cat([x[:rows, start:stop].flatten() for start, stop, rows in steps]) for x in (tokens, real)]
    return Rectangles(tuple((rows, stop - start) for start, stop, rows in steps), *cut)


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
