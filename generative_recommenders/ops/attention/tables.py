"""Attention whose weights are looked up in tables, whatever the tokens hold (FuXi-alpha, arXiv 2502.03036)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.reference import table_attention_reference
from generative_recommenders.ops.attention.tiles import (
    PairBias,
    SumOfProducts,
    TableBias,
    Tile,
    add_by_index,
    gathered,
    join_groups,
    keys_of,
    plan_of,
    rows_for_sums,
    top_left_view,
)
from generative_recommenders.ops.layout import Layout


def table_attention(v: torch.Tensor, layout: Layout, bias: TableBias | PairBias) -> list[torch.Tensor]:
    """For each table, ``A v`` with ``A[i, j] = table[index(i, j)]`` over what each token attends to.

    The weights are neither normalised nor divided, and all heads share them. v: ``[T, H, dv]``; returns ``[T, H, dv]``
    a table.
    """
    if isinstance(bias, PairBias):
        # On an accelerator: rows padded to the longest, so that no length is looked at.
        n, reach = layout.longest, (bias.position.numel() + 1) // 2
        values = layout.to_rectangle(v.flatten(1))[:, :n]
        weights = [bias.position[reach - n : reach + n - 1].unfold(0, n, 1).flip(0)]
        if bias.time is not None and bias.buckets is not None:
            # an embedding's gradient is summed in sorted order, the same in every run
            weights.append(F.embedding(bias.buckets.int(), bias.time[:, None]).squeeze(-1))
        pad = (0, 0, 0, layout.max_length - n)
        return [layout.flatten(F.pad(each.tril().to(v.dtype) @ values, pad)).view_as(v) for each in weights]
    if not dispatch.fast():
        return table_attention_reference(v, layout, bias)
    shared = v.flatten(1).unsqueeze(1)  # one product for all heads
    with dispatch.autocast(v, None):  # in the dtype that v comes in
        outputs = _GroupedTables.apply(shared, layout, bias.indices, *bias.tables)
    return [each.view_as(v) for each in outputs]


class _GroupedTables(torch.autograd.Function):
    """v: ``[T, 1, W]``. Weights of a tile are kept for its backward pass."""

    @staticmethod
    def forward(ctx, v, layout, indices, *tables):
        saved: list[torch.Tensor] = []
        remaining = iter(indices)
        out: list[list[torch.Tensor]] = [[] for _ in tables]
        for group, group_tiles in plan_of(layout):
            v_ = keys_of(group, v)
            saved.append(v_)
            for attended in out:
                attended.append(group.queries.empty(v))
            for tile, *parts in zip(group_tiles, *(group.queries.split(each[-1], 1) for each in out)):
                values = top_left_view(v_, tile.rows, tile.keys)
                for table, index, part in zip(tables, next(remaining), parts):
                    weights = _masked(gathered(table, index).to(v.dtype), tile)
                    torch.bmm(weights.expand(tile.rows, -1, -1), values, out=part)
                    saved.append(weights)
        ctx.save_for_backward(*tables, *saved)
        ctx.settings = layout, indices, len(tables), v.shape
        return tuple(join_groups(each, layout.queries, v.shape, v) for each in out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        layout, indices, num_tables, shape = ctx.settings
        remaining, index_of = iter(ctx.saved_tensors), iter(indices)
        d_tables = [rows_for_sums(next(remaining), [of[i] for of in indices]) for i in range(num_tables)]
        d_v = []
        for group, group_tiles in plan_of(layout):
            v_ = next(remaining)
            queries = group.queries
            d_outs = [queries.hide_padding(queries.gather(grad), 1) for grad in grads]
            d_v_ = SumOfProducts(v_)
            kept_of = [([next(remaining) for _ in grads], next(index_of)) for _ in group_tiles]
            by_tile = list(zip(group_tiles, kept_of, *(queries.split(each, 1) for each in d_outs)))
            # Last tile first, see `SumOfProducts`.
            for tile, (weights, index), *d_parts in reversed(by_tile):
                rows, values = tile.rows, top_left_view(v_, tile.rows, tile.keys)
                products = [(each.mT.expand(rows, -1, -1), d_out) for each, d_out in zip(weights, d_parts)]
                d_v_.add(rows, tile.keys, *products)
                for total, own, d_out in zip(d_tables, index, d_parts):
                    add_by_index(total, own, _masked(torch.bmm(d_out, values.mT), tile))
            d_v.append(d_v_.cells())
        return join_groups(d_v, layout.keys, shape, grads[0]), None, None, *(each.sum(0) for each in d_tables)


def _masked(cells: torch.Tensor, tile: Tile) -> torch.Tensor:
    """``cells [..., queries, keys]``, a new tensor's, with 0 where the tile's queries do not attend."""
    if tile.mask is not None:
        return cells * tile.mask[:, 0]
    cells[..., tile.known :].tril_()
    return cells
