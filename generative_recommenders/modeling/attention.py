"""Attention over the groups of a layout: softmax (arXiv 1706.03762) and pointwise SiLU (HSTU, arXiv 2402.17152).

Queries, keys and values come as tokens ``[T, H, d]`` and go back as tokens. Inside a group they are rectangles
``[g, H, n, d]``; a row never attends beyond itself, and grouping changes no number. Forward and backward are written out
so that on a CPU every large product is done in place and no gradient is scattered. On CUDA, softmax attention goes
through `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dropout import keep_mask
from .layout import Group, Layout


def visible(group: Group, layout: Layout) -> torch.Tensor:
    """Who sees whom: bool ``[n, n]`` (causal) or ``[g, 1, n, n]`` (by the layout's key and query integers).

    Cells behind a row's end are never seen by real ones: causality keeps them out, or their key is set out of reach.
    """
    if layout.visibility is None:
        columns = torch.arange(group.width, device=group.tokens.device)
        return columns[None, :] <= columns[:, None]
    out_of_reach = torch.iinfo(torch.int64).max
    key = group.gather(layout.visibility.key).masked_fill(~group.real(), out_of_reach)
    query = group.gather(layout.visibility.query)
    return (key[:, None, :] <= query[:, :, None])[:, None]


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, dropout_rate: float = 0.0, scale: float | None = None
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v over what each token sees, dropout on the probabilities.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``; returns ``[T, H, dv]``. scale: 1 / sqrt(d) unless given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        return _GroupedSoftmax.apply(q, k, v, layout, dropout_rate, scale)
    outputs = [_fused_group(q, k, v, group, layout, dropout_rate, scale) for group in layout.groups]
    return torch.cat(outputs).index_select(0, layout.ungroup)


def pointwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    biases: list[torch.Tensor] | None,
    divisor: float,
    dropout_rate: float = 0.0,
) -> torch.Tensor:
    """SiLU(q kᵀ + bias) / divisor · v over what each token sees (arXiv 2402.17152, eq. 2), no softmax.

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``; biases: one per group, broadcastable to ``[g, H, n, n]``, or None.
    """
    biases = biases if biases is not None else []
    return _GroupedPointwise.apply(q, k, v, layout, divisor, dropout_rate, *biases)


def _heads_first(group: Group, x: torch.Tensor) -> torch.Tensor:
    """``[T, H, d]`` tokens as ``[g, H, n, d]``."""
    return group.gather(x).transpose(1, 2)


def _tokens(rectangle: torch.Tensor) -> torch.Tensor:
    """``[g, H, n, d]`` as cells ``[g * n, H, d]``."""
    return rectangle.transpose(1, 2).flatten(0, 1)


def _fused_group(q, k, v, group, layout, dropout_rate, scale):
    q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v))
    causal = layout.visibility is None
    mask = None if causal else visible(group, layout)
    out = F.scaled_dot_product_attention(q_, k_, v_, mask, dropout_rate, is_causal=causal, scale=scale)
    return _tokens(out)


class _GroupedAttention(torch.autograd.Function):
    """What both kinds share: gather a group, attend, give cells back to tokens; and the same for gradients."""

    @staticmethod
    def ungroup(cells: list[torch.Tensor], layout: Layout, like: torch.Tensor, width: int) -> torch.Tensor:
        if not cells:
            return like.new_zeros(layout.num_tokens, like.shape[1], width)
        return torch.cat(cells).index_select(0, layout.ungroup)

    @staticmethod
    def zero_behind_ends(group: Group, layout: Layout, grad: torch.Tensor) -> torch.Tensor:
        """Output gradients as ``[g, H, n, dv]`` with repeated last tokens (padding cells) set to 0."""
        rectangle = _heads_first(group, grad)
        return rectangle * group.real()[:, None, :, None]


class _GroupedSoftmax(_GroupedAttention):
    @staticmethod
    def forward(ctx, q, k, v, layout, dropout_rate, scale):
        cells, saved = [], []
        for group in layout.groups:
            q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v))
            probabilities = torch.matmul(q_ * scale, k_.transpose(-1, -2))
            probabilities.masked_fill_(~visible(group, layout), torch.finfo(q.dtype).min)
            probabilities = torch.softmax(probabilities, -1)
            keep = keep_mask(probabilities.shape, dropout_rate, q.device) if dropout_rate > 0.0 else None
            cells.append(_tokens(torch.matmul(_dropped(probabilities, keep, dropout_rate), v_)))
            saved += [probabilities, keep]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.settings = (layout, dropout_rate, scale)
        return _GroupedAttention.ungroup(cells, layout, v, v.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        layout, rate, scale = ctx.settings
        grads: tuple[list, list, list] = ([], [], [])
        for index, group in enumerate(layout.groups):
            p, keep = saved[2 * index : 2 * index + 2]
            q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v))
            d_out = _GroupedAttention.zero_behind_ends(group, layout, grad)
            d_v = torch.matmul(_dropped(p, keep, rate).transpose(-1, -2), d_out)
            d_p = torch.matmul(d_out, v_.transpose(-1, -2))
            if keep is not None:
                d_p.mul_(keep).mul_(1.0 / (1.0 - rate))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_q = torch.matmul(d_s, k_).mul_(scale)
            d_k = torch.matmul(d_s.transpose(-1, -2), q_).mul_(scale)
            for collected, d in zip(grads, (d_q, d_k, d_v)):
                collected.append(_tokens(d))
        d_tokens = [_GroupedAttention.ungroup(g, layout, x, x.shape[-1]) for g, x in zip(grads, (q, k, v))]
        return (*d_tokens, None, None, None)


class _GroupedPointwise(_GroupedAttention):
    @staticmethod
    def forward(ctx, q, k, v, layout, divisor, dropout_rate, *biases):
        cells, keeps = [], []
        for index, group in enumerate(layout.groups):
            weights = F.silu(_pointwise_logits(q, k, group, biases, index), inplace=True)
            weights.masked_fill_(~visible(group, layout), 0.0)
            keep = keep_mask(weights.shape, dropout_rate, q.device) if dropout_rate > 0.0 else None
            out = torch.matmul(_dropped(weights, keep, dropout_rate), _heads_first(group, v))
            cells.append(_tokens(out.div_(divisor)))
            keeps.append(keep)
        ctx.save_for_backward(q, k, v, *keeps, *biases)
        ctx.settings = (layout, divisor, dropout_rate)
        return _GroupedAttention.ungroup(cells, layout, v, v.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *rest = ctx.saved_tensors
        layout, divisor, rate = ctx.settings
        keeps, biases = rest[: len(layout.groups)], rest[len(layout.groups) :]
        grads: tuple[list, list, list] = ([], [], [])
        d_biases = []
        for index, (group, keep) in enumerate(zip(layout.groups, keeps)):
            logits = _pointwise_logits(q, k, group, biases, index)
            d_out = _GroupedAttention.zero_behind_ends(group, layout, grad / divisor)
            d_v, d_s = _pointwise_backward(logits, _heads_first(group, v), d_out, visible(group, layout), keep, rate)
            d_q = torch.matmul(d_s, _heads_first(group, k))
            d_k = torch.matmul(d_s.transpose(-1, -2), _heads_first(group, q))
            for collected, d in zip(grads, (d_q, d_k, d_v)):
                collected.append(_tokens(d))
            if biases:
                d_biases.append(d_s.sum_to_size(biases[index].shape) if d_s.shape != biases[index].shape else d_s)
        d_tokens = [_GroupedAttention.ungroup(g, layout, x, x.shape[-1]) for g, x in zip(grads, (q, k, v))]
        return (*d_tokens, None, None, None, *d_biases)


def _pointwise_logits(q, k, group, biases, index):
    logits = torch.matmul(_heads_first(group, q), _heads_first(group, k).transpose(-1, -2))
    return logits.add_(biases[index]) if biases else logits


def _pointwise_backward(logits, v_, d_out, sees, keep, rate):
    """Gradients by v and by the logits, given those of the output; the activations are recomputed from the logits."""
    weights = F.silu(logits).masked_fill_(~sees, 0.0)
    d_v = torch.matmul(_dropped(weights, keep, rate).transpose(-1, -2), d_out)
    d_w = torch.matmul(d_out, v_.transpose(-1, -2))
    d_w = _dropped(d_w, keep, rate).masked_fill_(~sees, 0.0)
    return d_v, torch.ops.aten.silu_backward(d_w, logits)


def _dropped(weights: torch.Tensor, keep: torch.Tensor | None, rate: float) -> torch.Tensor:
    return weights if keep is None else (weights * keep).mul_(1.0 / (1.0 - rate))
