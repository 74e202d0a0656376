"""Differential attention (arXiv 2410.05258, eq. 1): a softmax attention, less lambda times another over the same
values.

On a CPU the second weights are taken off the first before they meet the values: one product with these, forward and
back, instead of two. Forward and backward are written out over the tiles of `ops.attention.tiles`.
"""

from __future__ import annotations

import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.attention.tiles import (
    SumOfProducts,
    drawn,
    join_groups,
    keep_masks,
    keys_of,
    plan_of,
    probabilities,
    top_left_view,
)
from generative_recommenders.ops.layout import Layout


def differential_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lambdas: torch.Tensor,
    layout: Layout,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """(softmax(q1 k1ᵀ / sqrt(d)) - lambda softmax(q2 k2ᵀ / sqrt(d))) v over what each token attends to, dropout on both
    softmaxes.

    q, k: ``[T, H, 2 d]``, a head's first half beside its second. v: ``[T, H, dv]``. lambdas: ``[H]``. Returns
    ``[T, H, dv]``.
    """
    if not dispatch.fast_on_cpu_in_one_dtype(q):
        return differential_attention_reference(q, k, v, lambdas, layout, dropout_rate)
    return _GroupedDifference.apply(q, k, v, lambdas, layout, dropout_rate)


def differential_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lambdas: torch.Tensor,
    layout: Layout,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """`differential_attention` by two attentions, under the same dropout masks."""
    halves = zip(q.chunk(2, -1), k.chunk(2, -1))
    first, second = (softmax_attention(*half, v, layout, dropout_rate) for half in halves)
    return first - lambdas[:, None] * second


class _GroupedDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lambdas, layout, dropout_rate):
        heads, scale = v.shape[1], (q.shape[2] // 2) ** -0.5
        ctx.settings = layout, 1.0 - dropout_rate, scale, (*q.shape[:2], q.shape[2] // 2)
        plan = plan_of(layout)
        masks = [keep_masks(dropout_rate, v, plan) for _ in range(2)]
        qs, ks = _halves(q), _halves(k)
        out, saved = [], []
        for group, group_tiles in plan:
            qs_ = [group.queries.gather(x).mul_(scale) for x in qs]
            ks_, v_ = [keys_of(group, x) for x in ks], keys_of(group, v)
            out.append(group.queries.empty(v))
            saved += [*qs_, *ks_, v_]
            by_tile = zip(
                group_tiles,
                *(group.queries.split(x, heads) for x in qs_),
                group.queries.split(out[-1], heads),
            )
            for tile, *qs_t, out_t in by_tile:
                rows, keys = tile.rows * heads, tile.keys
                softmaxes, kept = [], []
                for q_t, k_, source in zip(qs_t, ks_, masks):
                    p = probabilities(torch.bmm(q_t, top_left_view(k_, rows, keys).mT), tile, heads)
                    softmaxes.append(p)
                    kept.append(p if source is None else drawn(source, p.shape, layout, group, tile).mul_(p))
                first, second = (x.unflatten(0, (-1, heads)) for x in kept)
                weights = torch.addcmul(first, second, lambdas[:, None, None], value=-1.0).flatten(0, 1)
                torch.bmm(weights, top_left_view(v_, rows, keys), out=out_t)
                saved += [*softmaxes, *kept, weights]
            if dropout_rate:
                out[-1].mul_(1.0 / (1.0 - dropout_rate))
        ctx.save_for_backward(lambdas, *saved)
        return join_groups(out, layout.queries, v.shape, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        lambdas, *saved = ctx.saved_tensors
        layout, kept_share, scale, half_shape = ctx.settings
        heads, remaining = grad.shape[1], iter(saved)
        d_lambdas = torch.zeros_like(lambdas)
        d_qs: tuple[list, list] = [], []
        d_ks: tuple[list, list] = [], []
        d_v = []
        for group, group_tiles in plan_of(layout):
            qs_, ks_ = [next(remaining) for _ in range(2)], [next(remaining) for _ in range(2)]
            v_, queries = next(remaining), group.queries
            d_out = queries.hide_padding(queries.gather(grad), heads)
            if kept_share < 1.0:
                d_out.mul_(1.0 / kept_share)
            d_qs_ = [torch.empty_like(x) for x in qs_]
            d_ks_ = [SumOfProducts(x) for x in ks_]
            d_v_ = SumOfProducts(v_)
            kept_of = [[next(remaining) for _ in range(5)] for _ in group_tiles]
            split = (queries.split(x, heads) for x in (*qs_, *d_qs_, d_out))
            # Last tile first, see `SumOfProducts`.
            for tile, *parts, of_tile in reversed(list(zip(group_tiles, *split, kept_of))):
                *qs_t, d_first_q, d_second_q, d_out_t = parts
                *softmaxes, first, second, weights = of_tile
                rows, keys = tile.rows * heads, tile.keys
                d_v_.add(rows, keys, (weights.mT, d_out_t))
                d_w = torch.bmm(d_out_t, top_left_view(v_, rows, keys).mT)
                taken_off = torch.bmm(d_w.view(rows, 1, -1), second.view(rows, -1, 1))
                d_lambdas -= taken_off.view(-1, heads).sum(0)
                # The second softmax's gradients lack their factor -lambda: it comes later, a number a token.
                halves = zip(softmaxes, (first, second), qs_t, ks_, (d_first_q, d_second_q), d_ks_)
                for p, dropped, q_t, k_, d_q_t, d_k_ in halves:
                    if dropped is p:
                        d_s = torch.ops.aten._softmax_backward_data(d_w, p, -1, p.dtype)
                    else:
                        d_s = d_w * dropped
                        d_s.addcmul_(p, d_s.sum(-1, keepdim=True), value=-1.0)
                    torch.bmm(d_s, top_left_view(k_, rows, keys), out=d_q_t)
                    d_k_.add(rows, keys, (d_s.mT, q_t))
            for half in range(2):
                d_qs[half].append(d_qs_[half].mul_(scale))
                d_ks[half].append(d_ks_[half].cells())
            d_v.append(d_v_.cells())
        factors = 1.0, -lambdas[:, None]
        d_q, d_k = (
            torch.cat([join_groups(x, places, half_shape, grad) * by for x, by in zip(halves, factors)], -1)
            for halves, places in ((d_qs, layout.queries), (d_ks, layout.keys))
        )
        return d_q, d_k, join_groups(d_v, layout.keys, grad.shape, grad), d_lambdas, None, None


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves ``[T, H, d]`` of ``x [T, H, 2 d]``; of one head, so that its rows are gathered where they lie."""
    if x.shape[1] == 1 and x.is_contiguous():
        rows = x.view(len(x), 2, x.shape[2] // 2)
        return rows[:, :1], rows[:, 1:]
    first, second = x.chunk(2, -1)
    return first, second
