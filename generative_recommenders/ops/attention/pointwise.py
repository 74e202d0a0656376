"""Pointwise SiLU attention (HSTU, arXiv 2402.17152) over the groups of a layout.

Forward and backward are written out over the tiles of `ops.attention.tiles`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.reference import pointwise_attention_reference
from generative_recommenders.ops.attention.tiles import (
    PairBias,
    SumOfProducts,
    TableBias,
    add_by_index,
    drawn,
    hide,
    join_groups,
    keep_masks,
    keys_of,
    plan_of,
    rows_for_sums,
    sum_of_table_lookups,
    takes_kernel,
    top_left_view,
)
from generative_recommenders.ops.layout import Layout


def pointwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: TableBias | PairBias | None,
    divisor: float,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """SiLU(q kᵀ + bias) / divisor · v over what each token attends to (arXiv 2402.17152, eq. 2), no softmax.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``; returns ``[T, H, dv]``.
    """
    if not dispatch.fast():
        assert not isinstance(bias, PairBias)
        return pointwise_attention_reference(q, k, v, layout, bias, divisor, dropout_rate)
    if takes_kernel(layout, max(q.shape[2], v.shape[2])) and not isinstance(bias, TableBias):
        from generative_recommenders.ops.attention.fused import Weights, fused_attention

        weights = Weights(softmax=False, divisor=divisor, dropout_rate=dropout_rate)
        return fused_attention(q, k, v, layout, weights, bias)
    assert not isinstance(bias, PairBias)
    tables, indices = bias or TableBias((), [])
    with dispatch.autocast(q, None):  # in the dtype that q, k and v come in
        return _GroupedPointwise.apply(
            q, k, v, layout, indices, divisor, dropout_rate, torch.is_grad_enabled(), *tables
        )


class _GroupedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, indices, divisor, dropout_rate, keeps, *tables):
        heads = q.shape[1]
        saved: list[torch.Tensor | None] = []
        plan = plan_of(layout)
        masks = keep_masks(dropout_rate, q, plan)
        remaining = iter(indices)
        out = []
        for group, group_tiles in plan:
            q_, k_, v_ = group.queries.gather(q), keys_of(group, k), keys_of(group, v)
            # Into the copy of the values: the weights of the tiles are not passed over once more.
            v_.mul_(1.0 / (divisor * (1.0 - dropout_rate)))
            out.append(group.queries.empty(v))
            if keeps:
                saved += [q_, k_, v_]
            parts = zip(group_tiles, group.queries.split(q_, heads), group.queries.split(out[-1], heads))
            for tile, q_t, out_t in parts:
                rows, keys = tile.rows * heads, tile.keys
                logits = torch.bmm(q_t, top_left_view(k_, rows, keys).mT)
                if tables:
                    logits.unflatten(0, (-1, heads)).add_(sum_of_table_lookups(tables, next(remaining), tile))
                if not tables or tile.mask is not None:
                    hide(logits, tile, heads)
                weights = F.silu(logits, inplace=not keeps)
                kept = None if masks is None else drawn(masks, weights.shape, layout, group, tile)
                weights = weights if kept is None else weights.mul_(kept)
                torch.bmm(weights, top_left_view(v_, rows, keys), out=out_t)
                if keeps:
                    saved += [logits, kept, weights]
        ctx.save_for_backward(*tables, *saved)
        ctx.settings = layout, indices, len(tables), divisor * (1.0 - dropout_rate), (q.shape, k.shape, v.shape)
        return join_groups(out, layout.queries, v.shape, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, indices, num_tables, divisor, shapes = ctx.settings
        remaining, index_of = iter(ctx.saved_tensors), iter(indices)
        d_tables = [rows_for_sums(next(remaining), [of[i] for of in indices]) for i in range(num_tables)]
        heads = grad.shape[1]
        d_q, d_k, d_v = [], [], []
        for group, group_tiles in plan_of(layout):
            q_, k_, v_ = (next(remaining) for _ in range(3))
            queries = group.queries
            d_out = queries.hide_padding(queries.gather(grad), heads)
            d_q_, d_k_, d_v_ = torch.empty_like(q_), SumOfProducts(k_), SumOfProducts(v_)
            kept_of = [(*(next(remaining) for _ in range(3)), next(index_of, ())) for _ in group_tiles]
            by_tile = zip(group_tiles, *(queries.split(x, heads) for x in (q_, d_q_, d_out)), kept_of)
            # Last tile first, see `SumOfProducts`.
            for tile, q_t, d_q_t, d_out_t, (logits, kept, weights, index) in reversed(list(by_tile)):
                rows, keys = tile.rows * heads, tile.keys
                d_v_.add(rows, keys, (weights.mT, d_out_t))
                d_w = torch.bmm(d_out_t, top_left_view(v_, rows, keys).mT)
                d_s = torch.ops.aten.silu_backward(d_w if kept is None else d_w.mul_(kept), logits)
                torch.bmm(d_s, top_left_view(k_, rows, keys), out=d_q_t)
                d_k_.add(rows, keys, (d_s.mT, q_t))
                if d_tables:
                    # Heads share the tables; adding their few parts is faster than a sum over the axis.
                    d_cells = functools.reduce(torch.add, d_s.unflatten(0, (-1, heads)).unbind(1))
                    for total, of_cells in zip(d_tables, index):
                        add_by_index(total, of_cells, d_cells)
            d_q.append(d_q_)
            d_k.append(d_k_.cells())
            d_v.append(d_v_.cells().mul_(1.0 / divisor))
        summed = (total.sum(0) for total in d_tables)
        places = (layout.queries, layout.keys, layout.keys)
        d_inputs = (join_groups(*each, grad) for each in zip((d_q, d_k, d_v), places, shapes))
        return *d_inputs, None, None, None, None, None, *summed
