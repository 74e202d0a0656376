"""Attention over the groups of a layout: softmax (arXiv 1706.03762) and pointwise SiLU (HSTU, arXiv 2402.17152).

Queries, keys and values come as tokens ``[T, H, d]`` and go back as tokens. Inside a group they are rectangles
``[G, n, d]`` with G = g * H, one for each row and head; a row never attends beyond itself, and grouping changes no number.
Forward and backward are written out: a causal group is done in tiles of queries that leave out the keys none of them
sees, rectangles are gathered and ungathered by index (a gradient is never scattered), and what a tile's backward pass
needs is kept from its forward pass. On CUDA, softmax attention goes through
`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dropout import KeepMasks
from .layout import Group, Layout

_MASK_UNIT = 64
"""Heights of the causal masks that are kept are multiples of it."""


class Tile(NamedTuple):
    """Queries start..stop of a group's first ``rows`` rows against their first ``keys`` keys.

    Keys before ``known`` are seen by all of these queries; sees: bool, which of the others, ``[rows, keys - known]`` or
    ``[g, 1, rows, keys - known]``.
    """

    rows: int
    start: int
    stop: int
    keys: int
    known: int
    sees: torch.Tensor


class TableBias(NamedTuple):
    """A bias of logits looked up in tables: the sum over k of ``tables[k][indices[tile][k]]``, shared by the heads.

    tables: 1-d. indices: for each tile of the layout (in the order of its groups), one int64 index a table, of shape
    ``[stop - start, keys]`` or ``[g, stop - start, keys]``.
    """

    tables: tuple[torch.Tensor, ...]
    indices: list[tuple[torch.Tensor, ...]]


def tiles(group: Group, layout: Layout) -> list[Tile]:
    """Who sees whom, by the steps of a causal group. Cells behind a row's end are never seen by real ones."""
    width = group.width
    if layout.visibility is not None:
        return [Tile(len(group.lengths), 0, width, width, 0, visible(group, layout))]
    return [
        Tile(rows, start, stop, stop, start, _causal(stop - start, group.tokens.device))
        for start, stop, rows in group.steps
    ]


def _causal(height: int, device: torch.device) -> torch.Tensor:
    return _causal_mask(-(-height // _MASK_UNIT) * _MASK_UNIT, device)[:height, :height]


@functools.lru_cache(maxsize=8)
def _causal_mask(height: int, device: torch.device) -> torch.Tensor:
    return torch.ones(height, height, dtype=torch.bool, device=device).tril()


def visible(group: Group, layout: Layout) -> torch.Tensor:
    """Bool ``[n, n]`` (causal) or ``[g, 1, n, n]`` (by the layout's key and query integers)."""
    if layout.visibility is None:
        columns = torch.arange(group.width, device=group.tokens.device)
        return columns[None, :] <= columns[:, None]
    out_of_reach = torch.iinfo(torch.int64).max
    key = group.gather(layout.visibility.key).masked_fill(~group.real(), out_of_reach)
    query = group.gather(layout.visibility.query)
    return (key[:, None, :] <= query[:, :, None])[:, None]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    dropout_rate: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v over what each token sees, dropout on the probabilities.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``, or k itself, which is then gathered once; returns ``[T, H, dv]``. scale: 1 / sqrt(d)
    unless given. A token that sees nothing gets 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # in the dtype that q, k and v come in
            return _GroupedSoftmax.apply(q, k, None if v is k else v, layout, dropout_rate, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # gathered under autograd here
    cells = [_fused_group(q, k, v, group, layout, dropout_rate, scale) for group in layout.groups]
    return _ungroup(torch.cat(cells), layout, q.shape[1]) if cells else torch.zeros_like(v)


def pointwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: TableBias | None,
    divisor: float,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """SiLU(q kᵀ + bias) / divisor · v over what each token sees (arXiv 2402.17152, eq. 2), no softmax.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``; returns ``[T, H, dv]``.
    """
    tables, indices = bias or TableBias((), [])
    with torch.autocast(q.device.type, enabled=False):  # in the dtype that q, k and v come in
        return _GroupedPointwise.apply(q, k, v, layout, indices, divisor, dropout_rate, *tables)


def _rectangles(group: Group, *tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[T, H, d]`` tokens as rectangles ``[g * H, n, d]``, copies that may be changed."""
    for x in tokens:
        heads, width = x.shape[1:]
        rows, pitch = _as_rows(x)
        yield rows.index_select(0, group.cells(heads, pitch)).view(-1, group.width, width)


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``[T, H, d]`` as rows of d and how many of them lie from a token to the next; no copy of a slice of a wider
    projection.
    """
    (count, heads, width), pitch = x.shape, x.stride(0) // max(1, x.shape[2])
    if x.stride() != (pitch * width, width, 1) or pitch < heads:
        return x.reshape(-1, width), heads
    return x.as_strided((max(0, (count - 1) * pitch + heads), width), (width, 1)), pitch


def _ungroup(cells: torch.Tensor, layout: Layout, heads: int) -> torch.Tensor:
    """The rectangles of all groups, one behind the other as ``[cells * H, d]``, as tokens ``[T, H, d]``."""
    return cells.index_select(0, layout.cells(heads)).view(layout.num_tokens, heads, cells.shape[-1])


def _fused_group(q, k, v, group, layout, dropout_rate, scale):
    q_, k_, v_ = (_aligned(x).unflatten(0, (-1, q.shape[1])) for x in _rectangles(group, q, k, v))
    causal = layout.visibility is None
    mask = None if causal else visible(group, layout)
    out = F.scaled_dot_product_attention(q_, k_, v_, mask, dropout_rate, is_causal=causal, scale=scale)
    return out[..., : v.shape[-1]].reshape(-1, v.shape[-1])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``[G, n, d]`` with d filled up by zeros to a multiple of 8: the fused kernels take no other, and would leave the
    work to one that writes out ``[G, n, n]``."""
    return F.pad(x, (0, -x.shape[-1] % 8))


class _Cells:
    """Room for the rectangles ``[g * H, n, d]`` of all groups, one behind the other."""

    def __init__(self, layout: Layout, like: torch.Tensor, shape: torch.Size) -> None:
        """shape: ``[T, H, d]`` of the tokens."""
        self.layout, (self.heads, self.width) = layout, shape[1:]
        count = sum(group.tokens.numel() for group in layout.groups) * self.heads
        self.cells = like.new_empty(count, self.width)
        self.used = 0

    def take(self, group: Group) -> torch.Tensor:
        """The rectangles of the next group, not yet written."""
        first, self.used = self.used, self.used + group.tokens.numel() * self.heads
        return self.cells[first : self.used].view(-1, group.width, self.width)

    def tokens(self) -> torch.Tensor:
        return _ungroup(self.cells, self.layout, self.heads)


def _hide(logits: torch.Tensor, tile: Tile, heads: int) -> torch.Tensor:
    """``logits [g * H, rows, keys]`` in place, very low where the tile's queries do not see."""
    lowest = max(torch.finfo(logits.dtype).min / 2, -1e30)
    hidden = torch.zeros((), dtype=logits.dtype, device=logits.device).masked_fill(~tile.sees, lowest)
    logits.unflatten(0, (-1, heads))[..., tile.known :].add_(hidden)
    return logits


def _output_gradient(group: Group, grad: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The gradient by tokens ``[T, H, dv]`` as rectangles, times scale; 0 in the cells behind a row's end."""
    (d_out,) = _rectangles(group, grad)
    counts = group.real().to(grad.dtype) * scale
    d_out.unflatten(0, (-1, grad.shape[1])).mul_(counts[:, None, :, None])
    return d_out


def _queries(total: torch.Tensor, tile: Tile, heads: int) -> torch.Tensor:
    """The tile's queries in ``total [g * H, n, d]``."""
    return total[: tile.rows * heads, tile.start : tile.stop]


def _keys(total: torch.Tensor, tile: Tile, heads: int) -> torch.Tensor:
    """The tile's keys in ``total [g * H, n, d]``."""
    return total[: tile.rows * heads, : tile.keys]


def _set(part: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``left @ right`` into a part of a rectangle."""
    if part.is_contiguous():
        torch.bmm(left, right, out=part)
    else:
        part.copy_(torch.bmm(left, right))


def _add(part: torch.Tensor, written: int, *factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Adds the sum of ``left @ right`` to the first ``written`` rows of a part of a rectangle, and sets the others to it."""
    in_place = written == 0 and part.is_contiguous()
    change = torch.bmm(*factors[0], out=part if in_place else None)
    for left, right in factors[1:]:
        change.baddbmm_(left, right)
    if in_place:
        return
    if written:
        part[:written].add_(change[:written])
    if written < len(part):
        part[written:] = change[written:]


Plan = list[tuple[Group, list[Tile]]]


def _plan(layout: Layout) -> Plan:
    return [(group, tiles(group, layout)) for group in layout.groups]


def _keep_masks(rate: float, q: torch.Tensor, plan: Plan) -> KeepMasks | None:
    """The masks of all tiles' weights ``[g * H, rows, keys]``; None without dropout. q: ``[T, H, d]``."""
    if rate == 0.0:
        return None
    cells = sum(tile.rows * (tile.stop - tile.start) * tile.keys for _, part in plan for tile in part)
    return KeepMasks(rate, q, cells * q.shape[1])


class _GroupedSoftmax(torch.autograd.Function):
    """v: None where the values are the keys; their rectangles and gradients are then one."""

    @staticmethod
    def forward(ctx, q, k, v, layout, dropout_rate, scale):
        heads, kept_share = q.shape[1], 1.0 - dropout_rate
        out, saved = _Cells(layout, q, (k if v is None else v).shape), []
        plan = _plan(layout)
        masks = _keep_masks(dropout_rate, q, plan)
        for group, group_tiles in plan:
            rectangles = list(_rectangles(group, q, k, *([] if v is None else [v])))
            q_, k_, v_ = rectangles[0], rectangles[1], rectangles[-1]
            if scale != 1.0:
                q_.mul_(scale)
            out_ = out.take(group)
            saved += rectangles
            for tile in group_tiles:
                logits = _hide(torch.bmm(_queries(q_, tile, heads), _keys(k_, tile, heads).mT), tile, heads)
                p = torch.softmax(logits, -1)
                if layout.visibility is not None:  # a token may see nothing
                    p.unflatten(0, (-1, heads)).mul_(tile.sees.any(-1, keepdim=True))
                dropped = p if masks is None else masks.draw(p.shape).mul_(p)
                _set(_queries(out_, tile, heads), dropped, _keys(v_, tile, heads))
                saved += [p, dropped]
            if dropout_rate:
                out_.mul_(1.0 / kept_share)
        attended = out.tokens()
        ctx.save_for_backward(attended, *saved)
        ctx.settings = (layout, plan, kept_share, scale, (q.shape, k.shape, None if v is None else v.shape))
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        attended, *saved = ctx.saved_tensors
        layout, plan, kept_share, scale, shapes = ctx.settings
        d_q, d_k = (_Cells(layout, grad, shape) for shape in shapes[:2])
        d_v = None if shapes[2] is None else _Cells(layout, grad, shapes[2])
        heads = grad.shape[1]
        dots = (grad * attended).sum(-1, keepdim=True)  # the rows' sums of dp * p
        remaining = iter(saved)
        for group, group_tiles in plan:
            q_, k_ = next(remaining), next(remaining)
            v_ = k_ if d_v is None else next(remaining)
            d_out, dots_ = _output_gradient(group, grad, 1.0 / kept_share), _output_gradient(group, dots)
            d_q_, d_k_, d_v_ = d_q.take(group), d_k.take(group), None if d_v is None else d_v.take(group)
            pairs = [(next(remaining), next(remaining)) for _ in group_tiles]
            written = 0
            for tile, (p, dropped) in zip(reversed(group_tiles), reversed(pairs)):
                q_t, d_out_t = _queries(q_, tile, heads), _queries(d_out, tile, heads)
                d_s = torch.bmm(d_out_t, _keys(v_, tile, heads).mT).mul_(dropped)
                d_s.addcmul_(p, _queries(dots_, tile, heads), value=-1.0)
                _set(_queries(d_q_, tile, heads), d_s, _keys(k_, tile, heads))
                for_keys, for_values = (d_s.mT, q_t), (dropped.mT, d_out_t)
                if d_v_ is None:
                    _add(_keys(d_k_, tile, heads), written, for_keys, for_values)
                else:
                    _add(_keys(d_k_, tile, heads), written, for_keys)
                    _add(_keys(d_v_, tile, heads), written, for_values)
                written = tile.rows * heads
            if scale != 1.0:
                d_q_.mul_(scale)
        return d_q.tokens(), d_k.tokens(), None if d_v is None else d_v.tokens(), None, None, None


class _GroupedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, indices, divisor, dropout_rate, *tables):
        out, heads = _Cells(layout, v, v.shape), q.shape[1]
        saved: list[torch.Tensor | None] = []
        plan = _plan(layout)
        masks = _keep_masks(dropout_rate, q, plan)
        remaining = iter(indices)
        for group, group_tiles in plan:
            q_, k_, v_ = _rectangles(group, q, k, v)
            v_.mul_(1.0 / (divisor * (1.0 - dropout_rate)))
            out_ = out.take(group)
            saved += [q_, k_, v_]
            for tile in group_tiles:
                logits = torch.bmm(_queries(q_, tile, heads), _keys(k_, tile, heads).mT)
                if tables:
                    logits.unflatten(0, (-1, heads)).add_(looked_up(tables, next(remaining)))
                weights = F.silu(_hide(logits, tile, heads))
                kept = None if masks is None else masks.draw(weights.shape)
                weights = weights if kept is None else weights.mul_(kept)
                _set(_queries(out_, tile, heads), weights, _keys(v_, tile, heads))
                saved += [logits, kept, weights]
        ctx.save_for_backward(*tables, *saved)
        shapes = (q.shape, k.shape, v.shape)
        ctx.settings = (layout, plan, indices, len(tables), divisor * (1.0 - dropout_rate), shapes)
        return out.tokens()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, plan, indices, num_tables, divisor, shapes = ctx.settings
        remaining, index_of = iter(ctx.saved_tensors), iter(indices)
        d_tables = [_rows_for_sums(next(remaining), [of[i] for of in indices]) for i in range(num_tables)]
        d_q, d_k, d_v = (_Cells(layout, grad, shape) for shape in shapes)
        heads = grad.shape[1]
        for group, group_tiles in plan:
            q_, k_, v_ = (next(remaining) for _ in range(3))
            d_out = _output_gradient(group, grad)
            d_q_, d_k_, d_v_ = d_q.take(group), d_k.take(group), d_v.take(group)
            kept_of = [(*(next(remaining) for _ in range(3)), next(index_of, ())) for _ in group_tiles]
            written = 0
            for tile, (logits, kept, weights, index) in zip(reversed(group_tiles), reversed(kept_of)):
                d_out_t = _queries(d_out, tile, heads)
                _add(_keys(d_v_, tile, heads), written, (weights.mT, d_out_t))
                d_w = torch.bmm(d_out_t, _keys(v_, tile, heads).mT)
                d_s = torch.ops.aten.silu_backward(d_w if kept is None else d_w.mul_(kept), logits)
                _set(_queries(d_q_, tile, heads), d_s, _keys(k_, tile, heads))
                _add(_keys(d_k_, tile, heads), written, (d_s.mT, _queries(q_, tile, heads)))
                _add_to_tables(d_tables, index, d_s.unflatten(0, (-1, heads)))
                written = tile.rows * heads
            d_v_.mul_(1.0 / divisor)
        summed = (total.sum(0) for total in d_tables)
        return d_q.tokens(), d_k.tokens(), d_v.tokens(), None, None, None, None, *summed


def looked_up(tables: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of ``table[index]``, with an axis for the heads: ``[1, rows, keys]`` or ``[g, 1, rows, keys]``."""
    parts = [_gathered(table, index) for table, index in zip(tables, indices)]
    return sum(parts[1:], parts[0]).unsqueeze(-3)


def _gathered(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    flat = index.flatten(0, -2)
    return table.expand(flat.shape[0], -1).gather(1, flat).view(index.shape)


def _rows_for_sums(table: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros as wide as the table, a row for each of the tile that has most."""
    rows = max((index.shape[:-1].numel() for index in indices), default=0)
    return table.new_zeros(rows, table.numel())


def _add_to_tables(
    totals: Sequence[torch.Tensor], indices: Sequence[torch.Tensor], d_logits: torch.Tensor
) -> None:
    """Gradients of the tables from those of ``[g, H, rows, keys]`` logits: sums by index, apart for each row of a tile.

    totals: see `_rows_for_sums`, one for each table.
    """
    if not totals:
        return
    d_logits = d_logits.sum(1)
    for total, index in zip(totals, indices):
        d_part = (d_logits if index.dim() == 3 else d_logits.sum(0)).flatten(0, -2)
        total[: d_part.shape[0]].scatter_add_(1, index.flatten(0, -2), d_part.to(total.dtype))
