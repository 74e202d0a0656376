"""Tiles of attention: which queries of a group meet which keys, with the biases and dropout masks of the tiles.

The keys of a group are a rectangle ``[G, n, d]`` with G = g * H, one for each row and head; a row never attends beyond
itself, and grouping changes no number. A causal group is done in tiles of queries that leave out the keys that none of
them attends to, rectangles are gathered and ungathered by index (a gradient is never scattered), and what a tile's
backward pass needs is kept from its forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.groups import Group
from generative_recommenders.ops.dropout import KeepMasks
from generative_recommenders.ops.layout import AttentionMask, Layout
from generative_recommenders.ops.rectangles import Places

_MASK_UNIT = 64
"""Heights of the causal masks that are kept are multiples of it."""


class Tile(NamedTuple):
    """Queries start..stop of a group's first ``rows`` rows against their first ``keys`` keys.

    All of these queries attend to keys before ``known``. mask: bool ``[g, 1, stop - start, keys - known]``, to which of
    the others a query attends; None where that is a triangle.
    """

    rows: int
    start: int
    stop: int
    keys: int
    known: int
    mask: torch.Tensor | None


class TableBias(NamedTuple):
    """A bias of logits looked up in tables: the sum over k of ``tables[k][indices[tile][k]]``, shared by the heads.

    tables: 1-d. indices: for each tile of the layout (in the order of its groups), one int64 index a table, of shape
    ``[stop - start, keys]`` or ``[g, stop - start, keys]``.
    """

    tables: tuple[torch.Tensor, ...]
    indices: list[tuple[torch.Tensor, ...]]


class PairBias(NamedTuple):
    """A relative bias as the kernels of a GPU read it: ``position[N - 1 + j - i] + time[buckets[row, i, j]]``.

    position: ``[2 N - 1]``. time: ``[129]``, or None. buckets: ``[B, n, n]`` uint8, None without times; n is the
    longest row.
    """

    position: torch.Tensor
    time: torch.Tensor | None
    buckets: torch.Tensor | None


def takes_kernel(layout: Layout, head_width: int) -> bool:
    """Whether a kernel computes the attention of all tokens at once, without tiles.

    head_width: the larger of d and dv; a kernel holds queries, keys and values of one head in shared memory.
    """
    on = layout.positions
    if layout.attention_mask is not None or not dispatch.takes_kernels(on):
        return False
    return head_width <= 128 or (head_width <= 256 and dispatch.since_ampere(on))


def tiles(group: Group, layout: Layout) -> list[Tile]:
    """Attention mask, by the steps of a causal group. Cells past a row's end are never attended to by real ones."""
    width = group.width
    if layout.attention_mask is not None:
        return [Tile(group.lengths.shape[0], 0, width, width, 0, group_mask(group, layout.attention_mask))]
    return [Tile(rows, start, stop, stop, start, None) for start, stop, rows in group.steps]


def group_mask(group: Group, by: AttentionMask) -> torch.Tensor:
    """Bool ``[g, 1, n, n]``: which cells (last axis) each cell of a row attends to; none past the row's end."""
    out_of_reach = torch.iinfo(torch.int64).max
    key = group.gather(by.key).masked_fill(~group.real(), out_of_reach)
    return (key[:, None, :] <= group.gather(by.query)[:, :, None])[:, None]


def _new_future(height: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[height, height]``: very low above the diagonal, 0 elsewhere."""
    return torch.full((height, height), lowest(dtype), dtype=dtype, device=device).triu(1)


kept_future = functools.lru_cache(maxsize=8)(_new_future)


def lowest(dtype: torch.dtype) -> float:
    # Half of float16's least number, so that a bias may be added to it; in wider types far from theirs anyway.
    return max(torch.finfo(dtype).min / 2, -1e30)


def hide(logits: torch.Tensor, tile: Tile, heads: int) -> torch.Tensor:
    """``logits [rows * H, queries, keys]`` in place, very low where the tile's queries do not attend; a triangle also
    in what all rows share, ``[queries, keys]``."""
    if tile.mask is None:
        height = logits.shape[-2]
        # a tensor of a trace must not be kept: it holds no numbers
        future_of = _new_future if torch.compiler.is_compiling() else kept_future
        future = future_of(-(-height // _MASK_UNIT) * _MASK_UNIT, logits.dtype, logits.device)
        logits[..., tile.known :].add_(future[:height, :height])
    else:
        logits.unflatten(0, (-1, heads)).masked_fill_(~tile.mask, lowest(logits.dtype))
    return logits


def probabilities(logits: torch.Tensor, tile: Tile, heads: int) -> torch.Tensor:
    """The softmax of ``logits [rows * H, queries, keys]``, which are overwritten; 0 for a query that attends to
    nothing."""
    p = torch.softmax(hide(logits, tile, heads), -1)
    if tile.mask is not None:
        p.unflatten(0, (-1, heads)).mul_(tile.mask.any(-1, keepdim=True))
    return p


Plan = list[tuple[Group, list[Tile]]]


def plan_of(layout: Layout) -> Plan:
    """The groups and their tiles."""
    if "plan" not in layout.memo:
        layout.memo["plan"] = [(group, tiles(group, layout)) for group in layout.groups]
    return cast(Plan, layout.memo["plan"])


def keep_masks(rate: float, q: torch.Tensor, plan: Plan) -> KeepMasks | None:
    """The masks of all tiles' weights ``[g * H, rows, keys]``; None without dropout. q: ``[T, H, d]``."""
    if rate == 0.0:
        return None
    cells = sum(tile.rows * (tile.stop - tile.start) * tile.keys for _, part in plan for tile in part)
    return KeepMasks(rate, q, cells * q.shape[1])


def drawn(
    masks: KeepMasks, shape: torch.Size | tuple[int, ...], layout: Layout, group: Group, tile: Tile
) -> torch.Tensor:
    """The mask of one tile's weights ``[rows * H, queries, keys]``."""
    if masks.numbered is None:
        return masks.draw(shape)
    tokens = group.keys.tokens.view(-1, group.width)[: tile.rows, tile.start : tile.stop].long()
    heads = shape[0] // tile.rows
    # A number for each row of the weights: of its token, and of its head.
    numbers = masks.numbered.of(layout.num_tokens)[tokens][:, None] * heads
    numbers = numbers + torch.arange(heads, device=tokens.device)[:, None]
    return masks.draw(shape, numbers.flatten())


def sum_of_table_lookups(
    tables: Sequence[torch.Tensor], indices: Sequence[torch.Tensor], tile: Tile | None = None
) -> torch.Tensor:
    """The sum of ``table[index]``, with an axis for the heads: ``[1, rows, keys]`` or ``[g, 1, rows, keys]``.

    tile: a triangle that its queries do not attend to is hidden too, where that costs least.
    """
    # What all rows share first: it is the smallest, and the triangle is hidden in it once.
    shared, *own = sorted((gathered(*each) for each in zip(tables, indices)), key=torch.Tensor.dim)
    if tile is not None and tile.mask is None:
        hide(shared, tile, heads=1)
    return functools.reduce(lambda total, part: part.add_(total), own, shared).unsqueeze(-3)


def gathered(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` of a 1-d table."""
    flat = index.flatten(0, -2)
    return table.expand(flat.shape[0], -1).gather(1, flat).view(index.shape)


def rows_for_sums(table: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros as wide as the table, a row for each first index of the tile that has most."""
    rows = max((len(index) for index in indices), default=0)
    return table.new_zeros(rows, table.numel())


def add_by_index(total: torch.Tensor, index: torch.Tensor, d_cells: torch.Tensor) -> None:
    """Gradients ``[g, rows, keys]`` of what a tile looked up, summed by index into ``total`` of `rows_for_sums`."""
    d_part = (d_cells if index.dim() == 3 else d_cells.sum(0)).flatten(1)
    total[: len(d_part)].scatter_add_(1, index.flatten(1), d_part.to(total.dtype))


def keys_of(group: Group, x: torch.Tensor) -> torch.Tensor:
    """``[T, H, d]`` tokens as the rectangle ``[g * H, n, d]`` of a group, a copy."""
    return group.keys.gather(x).view(-1, group.width, x.shape[2])


def join_groups(cells: list[torch.Tensor], at: Places, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """The cells of all groups, ``[cells * H, d]`` each, as tokens of this shape ``[T, H, d]``."""
    if not cells:
        return like.new_zeros(shape)
    return at.ungather(cells[0] if len(cells) == 1 else torch.cat(cells), shape[1])


def top_left_view(rectangle: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``rectangle[:rows, :columns]`` in one step."""
    return rectangle.as_strided((rows, columns, rectangle.shape[2]), rectangle.stride())


class SumOfProducts:
    """The gradient of a group's keys or values ``[g * H, n, d]``: a sum of products, added tile by tile.

    Tiles come last first: a later tile has more keys and fewer rows, all of which the one before has too. So every row
    is set whole by the last tile that it reaches, and the rectangle needs no zeros.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.total, self.written = torch.empty_like(like), 0

    def add(self, rows: int, columns: int, *factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds the sum of ``left @ right`` to the first rows and columns."""
        part = top_left_view(self.total, rows, columns)
        in_place = self.written == 0 and part.is_contiguous()
        change = torch.bmm(*factors[0], out=part if in_place else None)
        for left, right in factors[1:]:
            change.baddbmm_(left, right)
        if self.written:
            part[: self.written].add_(change[: self.written])
        if self.written < rows and not in_place:
            part[self.written :] = change[self.written :]
        self.written = rows

    def cells(self) -> torch.Tensor:
        """``[cells * H, d]``"""
        return self.total.flatten(0, 1)
