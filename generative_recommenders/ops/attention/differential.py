"""Differential attention (arXiv 2410.05258, eq. 1): a softmax attention, less lambda times another over the same
values.

On a CPU the second weights are taken off the first before they meet the values: one product with these, forward and
back, instead of two. Forward and backward are written out over the tiles of `ops.attention.tiles`. One head attends to
the inputs themselves, see `differential_self_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    scale = (q.shape[2] // 2) ** -0.5
    return _GroupedDifference.apply(q, k, v, lambdas, layout, dropout_rate, scale, torch.is_grad_enabled())


def differential_self_attention(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    lambdas: torch.Tensor,
    layout: Layout,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """`differential_attention` of ``x [T, D]`` under projections without biases, for every head that lambdas has.

    w_q, w_k: ``[H * 2 d, D]``. w_v: ``[H * dv, D]``. Returns ``[T, H, dv]``.
    """
    heads = len(lambdas)
    if heads > 1 or not dispatch.fast_on_cpu_in_one_dtype(x):
        q, k, v = (F.linear(x, w).unflatten(-1, (heads, -1)) for w in (w_q, w_k, w_v))
        return differential_attention(q, k, v, lambdas, layout, dropout_rate)
    # One head takes x as the keys of both softmaxes and as the values: fewer and narrower copies and products. q·(Wk x)
    # is (Wkᵀ q)·x, so the keys' weights go into those of the queries, and the values' follow the attention.
    spare = -x.shape[1] % 8  # products of full widths are faster
    halves = zip(w_q.chunk(2), w_k.chunk(2))
    to_inputs = [F.pad(k * len(k) ** -0.5, (0, spare)).T @ q for q, k in halves]
    inputs = F.pad(x, (0, spare))[:, None]
    q = F.linear(x, torch.cat(to_inputs))[:, None]
    mixed = _GroupedDifference.apply(q, None, inputs, lambdas, layout, dropout_rate, 1.0, torch.is_grad_enabled())
    return F.linear(mixed, F.pad(w_v, (0, spare)))


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
    """k: None where the values are the keys of both softmaxes; their rectangles and gradients are then one."""

    @staticmethod
    def forward(ctx, q, k, v, lambdas, layout, dropout_rate, scale, keeps):
        heads, one = v.shape[1], k is None
        ctx.settings = layout, 1.0 - dropout_rate, scale, one, (*q.shape[:2], q.shape[2] // 2)
        plan = plan_of(layout)
        masks = [keep_masks(dropout_rate, v, plan) for _ in range(2)]
        qs, ks = _halves(q), () if one else _halves(k)
        out, saved = [], []
        for group, group_tiles in plan:
            qs_, v_ = [group.queries.gather(x) for x in qs], keys_of(group, v)
            if scale != 1.0:
                qs_ = [x.mul_(scale) for x in qs_]
            ks_ = [v_, v_] if one else [keys_of(group, x) for x in ks]
            out.append(group.queries.empty(v))
            if keeps:
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
                if keeps:
                    saved += [*softmaxes, *kept, weights]
            if dropout_rate:
                out[-1].mul_(1.0 / (1.0 - dropout_rate))
        ctx.save_for_backward(lambdas, *saved)
        return join_groups(out, layout.queries, v.shape, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        lambdas, *saved = ctx.saved_tensors
        layout, kept_share, scale, one, half_shape = ctx.settings
        heads, remaining = grad.shape[1], iter(saved)
        d_lambdas, negative = torch.zeros_like(lambdas), -lambdas[:, None, None]
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
            d_ks_ = [] if one else [SumOfProducts(x) for x in ks_]
            d_v_ = SumOfProducts(v_)
            kept_of = [[next(remaining) for _ in range(5)] for _ in group_tiles]
            split = (queries.split(x, heads) for x in (*qs_, *d_qs_, d_out))
            # Last tile first, see `SumOfProducts`.
            for tile, *parts, of_tile in reversed(list(zip(group_tiles, *split, kept_of))):
                first_q, second_q, d_first_q, d_second_q, d_out_t = parts
                *softmaxes, first, second, weights = of_tile
                rows, keys = tile.rows * heads, tile.keys
                d_w = torch.bmm(d_out_t, top_left_view(v_, rows, keys).mT)
                taken_off = torch.bmm(d_w.view(rows, 1, -1), second.view(rows, -1, 1))
                d_lambdas -= taken_off.view(-1, heads).sum(0)
                # The gradients of the second softmax lack their factor -lambda: here keys get it with the queries, and
                # queries get it later, a number a token.
                second_q = (second_q.unflatten(0, (-1, heads)) * negative).flatten(0, 1)
                halves = zip(softmaxes, (first, second), ks_, (first_q, second_q), (d_first_q, d_second_q))
                for_keys = []
                for p, dropped, k_, q_t, d_q_t in halves:
                    if dropped is p:
                        d_s = torch.ops.aten._softmax_backward_data(d_w, p, -1, p.dtype)
                    else:
                        d_s = d_w * dropped
                        d_s.addcmul_(p, d_s.sum(-1, keepdim=True), value=-1.0)
                    torch.bmm(d_s, top_left_view(k_, rows, keys), out=d_q_t)
                    for_keys.append((d_s.mT, q_t))
                d_v_.add(rows, keys, (weights.mT, d_out_t), *(for_keys if one else ()))
                for d_k_, products in zip(d_ks_, for_keys):
                    d_k_.add(rows, keys, products)
            for d_q, d_q_ in zip(d_qs, d_qs_):
                d_q.append(d_q_ if scale == 1.0 else d_q_.mul_(scale))
            for d_k, d_k_ in zip(d_ks, d_ks_):
                d_k.append(d_k_.cells())
            d_v.append(d_v_.cells())
        of_queries = [join_groups(x, layout.queries, half_shape, grad) for x in d_qs]
        of_queries[1].mul_(negative[:, 0])
        of_keys = None if one else torch.cat([join_groups(x, layout.keys, half_shape, grad) for x in d_ks], -1)
        of_values = join_groups(d_v, layout.keys, grad.shape, grad)
        return torch.cat(of_queries, -1), of_keys, of_values, d_lambdas, *(None,) * 4


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves ``[T, H, d]`` of ``x [T, H, 2 d]``; of one head, so that its rows are gathered where they lie."""
    if x.shape[1] == 1 and x.is_contiguous():
        rows = x.view(len(x), 2, x.shape[2] // 2)
        return rows[:, :1], rows[:, 1:]
    first, second = x.chunk(2, -1)
    return first, second
