"""Layouts of a batch: the order of its tokens in memory, and its attention mask.

Everything position-wise in an encoder runs on ``[T, D]`` without knowing how the tokens are laid out. A jagged layout
holds the real tokens only (T = sum of lengths); a padded one holds whole rectangles (T = B * N, padding included).
Attention asks the layout for its groups, see `ops.attention.groups`. Both layouts give the same numbers on real tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.groups import (
    Group,
    Grouping,
    groups_of_rectangle,
    groups_of_rows,
)
from generative_recommenders.ops.jagged import jagged_to_padded, padded_to_jagged
from generative_recommenders.ops.rectangles import Places


@dataclass(frozen=True)
class AttentionMask:
    """Position i of a sequence attends to its position j where ``key[j] <= query[i]``; both ``[T]`` int64."""

    key: torch.Tensor
    query: torch.Tensor


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
        causal = self.attention_mask is None
        if self.valid is not None:
            return groups_of_rectangle(self.lengths, self.valid.view(-1, self.max_length), causal)
        host = self.lengths.cpu().numpy() if self.host_lengths is None else self.host_lengths
        return moved(groups_of_rows(host, causal), self.device)

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
        """Values computed from the layout once for all blocks of an encoder."""
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
        columns = rectangle.shape[1]
        if columns not in self.memo:
            # one conversion, of the cells' numbers; every column of events is then a plain gather
            cells = torch.arange(self.num_rows * columns, device=self.device).view(self.num_rows, columns)
            self.memo[columns] = padded_to_jagged(cells, self.offsets, self.num_tokens)
        return rectangle.flatten().index_select(0, cast(torch.Tensor, self.memo[columns]))

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

    lengths: ``[B]`` int64; kept on the CPU by loaders, so that nothing waits for an accelerator. UserError for lengths
    that are none of a row of max_length columns.
    """
    device = device or lengths.device
    host = lengths.cpu().numpy().astype(np.int64)
    least, longest = host.min(initial=0), host.max(initial=0)
    if least < 0 or longest > max_length:
        raise UserError(
            f"lengths reach from {least} to {longest}, and a row has {max_length} columns: cut them to 0..{max_length}"
        )
    starts, row_of = np.cumsum(host) - host, np.repeat(np.arange(host.size), host)
    fields = {
        "lengths": host,
        "positions": np.arange(row_of.size) - np.repeat(starts, host),
        "row_of": row_of,
        "starts": starts,
    }
    tensors = {name: torch.from_numpy(each) for name, each in fields.items()}
    return Layout(max_length=max_length, host_lengths=host, **moved(tensors, device))


def device_layout(lengths: torch.Tensor, max_length: int, num_tokens: int) -> Layout:
    """`jagged_layout` of lengths on an accelerator whose sum is known: nothing waits for it, but for groups."""
    ends = lengths.cumsum(0)
    starts = ends - lengths
    rows = torch.arange(len(lengths), device=lengths.device)
    row_of = rows.repeat_interleave(lengths, output_size=num_tokens)
    positions = torch.arange(num_tokens, device=lengths.device) - starts[row_of]
    return Layout(lengths, max_length, positions, row_of, starts)


def padded_layout(lengths: torch.Tensor, max_length: int) -> Layout:
    """The layout of whole rectangles ``[B, N]``, padding included; no length is looked at, so that it can be
    exported."""
    device, rows = lengths.device, lengths.numel()
    positions = torch.arange(max_length, device=device).expand(rows, max_length).reshape(-1)
    row_of = torch.arange(rows, device=device)[:, None].expand(rows, max_length).reshape(-1)
    valid = (positions < lengths[row_of]).view(-1, 1)
    return Layout(lengths, max_length, positions, row_of, torch.arange(rows, device=device) * max_length, valid=valid)


def last_tokens_pay(layout: Layout, x: torch.Tensor) -> bool:
    """Whether a block of a causal encoder takes less time for the last token of each row alone than for all
    ``x [T, D]``: on a CPU. A GPU computes the others in the same time, and a padded layout is there to be exported as
    it is.
    """
    causal = layout.valid is None and layout.attention_mask is None and layout.num_tokens > 0
    return causal and dispatch.fast_on_cpu_in_one_dtype(x)


def attended_tokens(layout: Layout) -> torch.Tensor:
    """``[T]`` int64: how many tokens each one attends to, 1 at least."""
    mask = layout.attention_mask
    if mask is None or not layout.num_tokens:
        return layout.positions + 1
    # key <= query counts within a row, in a list sorted by row and key: a binary search for each query.
    lowest = torch.minimum(mask.key.min(), mask.query.min())
    width = torch.maximum(mask.key.max(), mask.query.max()) - lowest + 2
    rows = layout.row_of * width  # so that all rows are searched as one sorted list
    keys = rows + mask.key - lowest
    if layout.valid is not None:
        keys = torch.where(layout.valid[:, 0], keys, rows + width - 1)  # beyond every query
    found = torch.searchsorted(keys.sort().values, rows + mask.query - lowest, right=True)
    return (found - layout.starts[layout.row_of]).clamp(min=1)


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors inside (nested) dataclasses, tuples and dictionaries on another device; copies from
    pinned memory do not wait."""
    if isinstance(value, torch.Tensor):
        # Safe without pinned memory: the copy then waits by itself.
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value
