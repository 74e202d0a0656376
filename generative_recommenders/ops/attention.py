"""Attention over the groups of a layout: softmax (arXiv 1706.03762) and pointwise SiLU (HSTU, arXiv 2402.17152).

Queries, keys and values come as tokens ``[T, H, d]`` and go back as tokens. The keys of a group are a rectangle
``[G, n, d]`` with G = g * H, one for each row and head; a row never attends beyond itself, and grouping changes no number.
Forward and backward are written out: a causal group is done in tiles of queries that leave out the keys none of them
sees, rectangles are gathered and ungathered by index (a gradient is never scattered), and what a tile's backward pass
needs is kept from its forward pass. On CUDA, softmax attention goes through
`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention_reference import (
    pointwise_attention_reference,
    softmax_attention_reference,
)
from generative_recommenders.ops.layout import Group, Layout
from generative_recommenders.ops.rectangles import Places
from generative_recommenders.ops.tiles import TableBias, hide, keep_masks, looked_up, plan_of, visible


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
    if not dispatch.fast(q):
        return softmax_attention_reference(q, k, v, layout, dropout_rate, scale)
    if dispatch.fast_on_cpu(q):
        with dispatch.autocast(q, None):  # in the dtype that q, k and v come in
            return _GroupedSoftmax.apply(q, k, None if v is k else v, layout, dropout_rate, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # gathered under autograd here
    cells = [_fused_group(q, k, v, group, layout, dropout_rate, scale) for group in layout.groups]
    return layout.keys.ungather(torch.cat(cells), q.shape[1]) if cells else torch.zeros_like(v)


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
    if not dispatch.fast(q):
        return pointwise_attention_reference(q, k, v, layout, bias, divisor, dropout_rate)
    tables, indices = bias or TableBias((), [])
    with dispatch.autocast(q, None):  # in the dtype that q, k and v come in
        return _GroupedPointwise.apply(q, k, v, layout, indices, divisor, dropout_rate, *tables)


def _fused_group(q, k, v, group, layout, dropout_rate, scale):
    q_, k_, v_ = (_aligned(_keys(group, x)).unflatten(0, (-1, q.shape[1])) for x in (q, k, v))
    by = layout.visibility
    mask = None if by is None else visible(group, by)
    out = F.scaled_dot_product_attention(q_, k_, v_, mask, dropout_rate, is_causal=by is None, scale=scale)
    return out[..., : v.shape[-1]].reshape(-1, v.shape[-1])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``[G, n, d]`` with d filled up by zeros to a multiple of 8: the fused kernels take no other, and would leave the
    work to one that writes out ``[G, n, n]``."""
    return F.pad(x, (0, -x.shape[-1] % 8))


def _keys(group: Group, x: torch.Tensor) -> torch.Tensor:
    """``[T, H, d]`` tokens as the rectangle ``[g * H, n, d]`` of a group, a copy."""
    return group.keys.gather(x).view(-1, group.width, x.shape[2])


def _together(cells: list[torch.Tensor], at: Places, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """The cells of all groups, ``[cells * H, d]`` each, as tokens of this shape ``[T, H, d]``."""
    if not cells:
        return like.new_zeros(shape)
    return at.ungather(cells[0] if len(cells) == 1 else torch.cat(cells), shape[1])


def _corner(rectangle: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``rectangle[:rows, :columns]`` in one step."""
    return rectangle.as_strided((rows, columns, rectangle.shape[2]), rectangle.stride())


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


class _GroupedSoftmax(torch.autograd.Function):
    """v: None where the values are the keys; their rectangles and gradients are then one."""

    @staticmethod
    def forward(ctx, q, k, v, layout, dropout_rate, scale):
        heads, kept_share = q.shape[1], 1.0 - dropout_rate
        plan = plan_of(layout)
        masks = keep_masks(dropout_rate, q, plan)
        out, saved = [], []
        for group, group_tiles in plan:
            q_, k_ = group.queries.gather(q), _keys(group, k)
            v_ = k_ if v is None else _keys(group, v)
            if scale != 1.0:
                q_.mul_(scale)
            out.append(group.queries.empty(v_.view(-1, heads, v_.shape[-1])))
            saved += [q_, k_] if v is None else [q_, k_, v_]
            parts = zip(group_tiles, group.queries.split(q_, heads), group.queries.split(out[-1], heads))
            for tile, q_t, out_t in parts:
                rows, seen = tile.rows * heads, tile.keys
                k_t = _corner(k_, rows, seen)
                p = torch.softmax(hide(torch.bmm(q_t, k_t.mT), tile, heads), -1)
                if tile.sees is not None:  # a token may see nothing
                    p.unflatten(0, (-1, heads)).mul_(tile.sees.any(-1, keepdim=True))
                dropped = p if masks is None else masks.draw(p.shape).mul_(p)
                torch.bmm(dropped, k_t if v is None else _corner(v_, rows, seen), out=out_t)
                saved += [p, dropped]
            if dropout_rate:
                out[-1].mul_(1.0 / kept_share)
        attended = _together(out, layout.queries, (k if v is None else v).shape, q)
        ctx.save_for_backward(attended, *saved)
        ctx.settings = (layout, kept_share, scale, v is None, (q.shape, k.shape))
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        attended, *saved = ctx.saved_tensors
        layout, kept_share, scale, one, shapes = ctx.settings
        heads = grad.shape[1]
        dots = (grad * attended).sum(-1, keepdim=True)  # the rows' sums of dp * p
        remaining = iter(saved)
        d_q, d_k, d_v = [], [], []
        for group, group_tiles in plan_of(layout):
            q_, k_ = next(remaining), next(remaining)
            v_ = k_ if one else next(remaining)
            queries = group.queries
            d_out, dots_ = (queries.hide_padding(queries.gather(x), heads) for x in (grad, dots))
            if kept_share < 1.0:
                d_out.mul_(1.0 / kept_share)
            d_q_, d_k_, d_v_ = (
                torch.empty_like(q_),
                torch.empty_like(k_),
                None if one else torch.empty_like(v_),
            )
            kept_of = [(next(remaining), next(remaining)) for _ in group_tiles]
            by_tile = zip(group_tiles, *(queries.split(x, heads) for x in (q_, d_q_, d_out, dots_)), kept_of)
            written = 0
            for tile, q_t, d_q_t, d_out_t, dots_t, (p, dropped) in reversed(list(by_tile)):
                rows, seen = tile.rows * heads, tile.keys
                k_t = _corner(k_, rows, seen)
                d_s = torch.bmm(d_out_t, (k_t if one else _corner(v_, rows, seen)).mT).mul_(dropped)
                d_s.addcmul_(p, dots_t, value=-1.0)
                torch.bmm(d_s, k_t, out=d_q_t)
                for_keys, for_values = (d_s.mT, q_t), (dropped.mT, d_out_t)
                if d_v_ is None:
                    _add(_corner(d_k_, rows, seen), written, for_keys, for_values)
                else:
                    _add(_corner(d_k_, rows, seen), written, for_keys)
                    _add(_corner(d_v_, rows, seen), written, for_values)
                written = rows
            d_q.append(d_q_ if scale == 1.0 else d_q_.mul_(scale))
            d_k.append(d_k_.flatten(0, 1))
            if d_v_ is not None:
                d_v.append(d_v_.flatten(0, 1))
        d_values = None if one else _together(d_v, layout.keys, grad.shape, grad)
        d_inputs = (
            _together(d_q, layout.queries, shapes[0], grad),
            _together(d_k, layout.keys, shapes[1], grad),
            d_values,
        )
        return *d_inputs, None, None, None


class _GroupedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, indices, divisor, dropout_rate, *tables):
        heads = q.shape[1]
        saved: list[torch.Tensor | None] = []
        plan = plan_of(layout)
        masks = keep_masks(dropout_rate, q, plan)
        remaining = iter(indices)
        out = []
        for group, group_tiles in plan:
            q_, k_, v_ = group.queries.gather(q), _keys(group, k), _keys(group, v)
            v_.mul_(1.0 / (divisor * (1.0 - dropout_rate)))
            out.append(group.queries.empty(v))
            saved += [q_, k_, v_]
            parts = zip(group_tiles, group.queries.split(q_, heads), group.queries.split(out[-1], heads))
            for tile, q_t, out_t in parts:
                rows, seen = tile.rows * heads, tile.keys
                logits = torch.bmm(q_t, _corner(k_, rows, seen).mT)
                if tables:
                    logits.unflatten(0, (-1, heads)).add_(looked_up(tables, next(remaining), tile))
                if not tables or tile.sees is not None:
                    hide(logits, tile, heads)
                weights = F.silu(logits)
                kept = None if masks is None else masks.draw(weights.shape)
                weights = weights if kept is None else weights.mul_(kept)
                torch.bmm(weights, _corner(v_, rows, seen), out=out_t)
                saved += [logits, kept, weights]
        ctx.save_for_backward(*tables, *saved)
        ctx.settings = (
            layout,
            indices,
            len(tables),
            divisor * (1.0 - dropout_rate),
            (q.shape, k.shape, v.shape),
        )
        return _together(out, layout.queries, v.shape, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, indices, num_tables, divisor, shapes = ctx.settings
        remaining, index_of = iter(ctx.saved_tensors), iter(indices)
        d_tables = [_rows_for_sums(next(remaining), [of[i] for of in indices]) for i in range(num_tables)]
        heads = grad.shape[1]
        d_q, d_k, d_v = [], [], []
        for group, group_tiles in plan_of(layout):
            q_, k_, v_ = (next(remaining) for _ in range(3))
            queries = group.queries
            d_out = queries.hide_padding(queries.gather(grad), heads)
            d_q_, d_k_, d_v_ = (torch.empty_like(x) for x in (q_, k_, v_))
            kept_of = [(*(next(remaining) for _ in range(3)), next(index_of, ())) for _ in group_tiles]
            by_tile = zip(group_tiles, *(queries.split(x, heads) for x in (q_, d_q_, d_out)), kept_of)
            written = 0
            for tile, q_t, d_q_t, d_out_t, (logits, kept, weights, index) in reversed(list(by_tile)):
                rows, seen = tile.rows * heads, tile.keys
                _add(_corner(d_v_, rows, seen), written, (weights.mT, d_out_t))
                d_w = torch.bmm(d_out_t, _corner(v_, rows, seen).mT)
                d_s = torch.ops.aten.silu_backward(d_w if kept is None else d_w.mul_(kept), logits)
                torch.bmm(d_s, _corner(k_, rows, seen), out=d_q_t)
                _add(_corner(d_k_, rows, seen), written, (d_s.mT, q_t))
                _add_to_tables(d_tables, index, d_s.unflatten(0, (-1, heads)))
                written = rows
            d_q.append(d_q_)
            d_k.append(d_k_.flatten(0, 1))
            d_v.append(d_v_.mul_(1.0 / divisor).flatten(0, 1))
        summed = (total.sum(0) for total in d_tables)
        places = (layout.queries, layout.keys, layout.keys)
        d_inputs = (_together(*each, grad) for each in zip((d_q, d_k, d_v), places, shapes))
        return *d_inputs, None, None, None, None, *summed


def _rows_for_sums(table: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros as wide as the table, a row for each first index of the tile that has most."""
    rows = max((len(index) for index in indices), default=0)
    return table.new_zeros(rows, table.numel())


def _add_to_tables(
    totals: Sequence[torch.Tensor], indices: Sequence[torch.Tensor], d_logits: torch.Tensor
) -> None:
    """Gradients of the tables from those of ``[g, H, rows, keys]`` logits: sums by index, apart for each first index.

    totals: see `_rows_for_sums`, one for each table.
    """
    if not totals:
        return
    d_logits = functools.reduce(torch.add, d_logits.unbind(1))  # faster than a sum, which is of few
    for total, index in zip(totals, indices):
        d_part = (d_logits if index.dim() == 3 else d_logits.sum(0)).flatten(1)
        total[: len(d_part)].scatter_add_(1, index.flatten(1), d_part.to(total.dtype))
