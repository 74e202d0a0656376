"""Softmax attention (arXiv 1706.03762) over the groups of a layout.

On a CPU forward and backward are written out over the tiles of `ops.attention.tiles`. On CUDA causal attention of
heads up to 256 wide is a kernel of `ops.attention.kernels`; any other, and all of it without Triton, goes through
`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch, numbered_rows
from generative_recommenders.ops.attention.reference import softmax_attention_reference
from generative_recommenders.ops.attention.tiles import (
    SumOfProducts,
    drawn,
    group_mask,
    join_groups,
    keep_masks,
    keys_of,
    plan_of,
    probabilities,
    takes_kernel,
    top_left_view,
)
from generative_recommenders.ops.layout import Layout


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    dropout_rate: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v over what each token attends to, dropout on the probabilities.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``, or k itself, which is then gathered once; returns ``[T, H, dv]``. scale: 1 /
    sqrt(d) unless given. A token that attends to nothing gets 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not dispatch.fast():
        return softmax_attention_reference(q, k, v, layout, dropout_rate, scale)
    if dispatch.fast_on_cpu(q) or numbered_rows.current() is not None:
        with dispatch.autocast(q, None):  # in the dtype that q, k and v come in
            return _GroupedSoftmax.apply(
                q, k, None if v is k else v, layout, dropout_rate, scale, torch.is_grad_enabled()
            )
    if takes_kernel(layout, max(q.shape[2], v.shape[2])):
        from generative_recommenders.ops.attention.fused import Weights, fused_attention

        return fused_attention(q, k, v, layout, Weights(softmax=True, logit_scale=scale, dropout_rate=dropout_rate))
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # gathered under autograd here
    cells, by = [], layout.attention_mask
    for group in layout.groups:
        # the fused kernels take widths that are multiples of 8 alone, and would leave others to one that writes out [G,
        # n, n]
        padded = (F.pad(keys_of(group, x), (0, -x.shape[-1] % 8)) for x in (q, k, v))
        q_, k_, v_ = (x.unflatten(0, (-1, q.shape[1])) for x in padded)
        mask = None if by is None else group_mask(group, by)
        out = F.scaled_dot_product_attention(q_, k_, v_, mask, dropout_rate, is_causal=by is None, scale=scale)
        cells.append(out[..., : v.shape[-1]].reshape(-1, v.shape[-1]))
    return layout.keys.ungather(torch.cat(cells), q.shape[1]) if cells else torch.zeros_like(v)


class _GroupedSoftmax(torch.autograd.Function):
    """v: None where the values are the keys; their rectangles and gradients are then one."""

    @staticmethod
    def forward(ctx, q, k, v, layout, dropout_rate, scale, keeps):
        heads, kept_share = q.shape[1], 1.0 - dropout_rate
        plan = plan_of(layout)
        masks = keep_masks(dropout_rate, q, plan)
        out, saved = [], []
        for group, group_tiles in plan:
            q_, k_ = group.queries.gather(q), keys_of(group, k)
            v_ = k_ if v is None else keys_of(group, v)
            # Queries are scaled once, not the logits of every tile.
            if scale != 1.0:
                q_.mul_(scale)
            out.append(group.queries.empty(v_.view(-1, heads, v_.shape[-1])))
            if keeps:
                saved += [q_, k_] if v is None else [q_, k_, v_]
            parts = zip(group_tiles, group.queries.split(q_, heads), group.queries.split(out[-1], heads))
            for tile, q_t, out_t in parts:
                rows, keys = tile.rows * heads, tile.keys
                k_t = top_left_view(k_, rows, keys)
                p = probabilities(torch.bmm(q_t, k_t.mT), tile, heads)
                dropped = p if masks is None else drawn(masks, p.shape, layout, group, tile).mul_(p)
                torch.bmm(dropped, k_t if v is None else top_left_view(v_, rows, keys), out=out_t)
                if keeps:
                    saved += [p, dropped]
            if dropout_rate:
                out[-1].mul_(1.0 / kept_share)
        attended = join_groups(out, layout.queries, (k if v is None else v).shape, q)
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
            d_q_, d_k_ = torch.empty_like(q_), SumOfProducts(k_)
            d_v_ = None if one else SumOfProducts(v_)
            kept_of = [(next(remaining), next(remaining)) for _ in group_tiles]
            by_tile = zip(group_tiles, *(queries.split(x, heads) for x in (q_, d_q_, d_out, dots_)), kept_of)
            # Last tile first, see `SumOfProducts`.
            for tile, q_t, d_q_t, d_out_t, dots_t, (p, dropped) in reversed(list(by_tile)):
                rows, keys = tile.rows * heads, tile.keys
                k_t = top_left_view(k_, rows, keys)
                d_s = torch.bmm(d_out_t, (k_t if one else top_left_view(v_, rows, keys)).mT).mul_(dropped)
                d_s.addcmul_(p, dots_t, value=-1.0)
                torch.bmm(d_s, k_t, out=d_q_t)
                for_keys, for_values = (d_s.mT, q_t), (dropped.mT, d_out_t)
                if d_v_ is None:
                    d_k_.add(rows, keys, for_keys, for_values)
                else:
                    d_k_.add(rows, keys, for_keys)
                    d_v_.add(rows, keys, for_values)
            d_q.append(d_q_ if scale == 1.0 else d_q_.mul_(scale))
            d_k.append(d_k_.cells())
            if d_v_ is not None:
                d_v.append(d_v_.cells())
        return (
            join_groups(d_q, layout.queries, shapes[0], grad),
            join_groups(d_k, layout.keys, shapes[1], grad),
            None if one else join_groups(d_v, layout.keys, grad.shape, grad),
            *(None, None, None, None),
        )
