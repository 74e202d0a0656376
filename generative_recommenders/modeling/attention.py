"""Attention over the groups of a layout: softmax (arXiv 1706.03762) and pointwise SiLU (HSTU, arXiv 2402.17152).

Queries, keys and values come as tokens ``[T, H, d]`` and go back as tokens. Inside a group they are rectangles
``[g, H, n, d]``; a row never attends beyond itself, and grouping changes no number. Forward and backward are written out
so that on a CPU large products are done in place, no gradient is scattered, and a causal group is done in tiles of queries
that leave out the keys none of them sees. On CUDA, softmax attention goes through
`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dropout import dropout_multiplier
from .layout import Group, Layout

TILE = 64
"""Queries of a causal tile."""


class Tile(NamedTuple):
    """Queries start..stop of a group against its first ``keys`` keys.

    sees: bool, broadcastable to ``[g, H, stop - start, keys]``.
    """

    start: int
    stop: int
    keys: int
    sees: torch.Tensor


def tiles(group: Group, layout: Layout) -> Iterator[Tile]:
    """Who sees whom, cut into tiles. Cells behind a row's end are never seen by real ones."""
    if layout.visibility is not None:
        yield Tile(0, group.width, group.width, visible(group, layout))
        return
    columns = torch.arange(group.width, device=group.tokens.device)
    for start in range(0, group.width, TILE):
        stop = min(start + TILE, group.width)
        yield Tile(start, stop, stop, columns[:stop] <= columns[start:stop, None])


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

    q, k: ``[T, H, d]``; v: ``[T, H, dv]``; returns ``[T, H, dv]``. scale: 1 / sqrt(d) unless given. A token that sees
    nothing gets 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # in the dtype that q, k and v come in
            return _GroupedSoftmax.apply(q, k, v, layout, dropout_rate, scale)
    outputs = [_fused_group(q, k, v, group, layout, dropout_rate, scale) for group in layout.groups]
    return _ungroup(outputs, layout, v)


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
    with torch.autocast(q.device.type, enabled=False):  # in the dtype that q, k and v come in
        return _GroupedPointwise.apply(q, k, v, layout, divisor, dropout_rate, *(biases or ()))


def _heads_first(group: Group, x: torch.Tensor) -> torch.Tensor:
    """``[T, H, d]`` tokens as ``[g, H, n, d]``."""
    return group.gather(x).transpose(1, 2)


def _cells(rectangle: torch.Tensor) -> torch.Tensor:
    """``[g, H, n, d]`` as cells ``[g * n, H, d]``."""
    return rectangle.transpose(1, 2).flatten(0, 1)


def _ungroup(cells: list[torch.Tensor], layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """The groups' cells as tokens ``[T, H, d]``."""
    if not cells:
        return torch.zeros_like(like)
    return torch.cat(cells).index_select(0, layout.ungroup)


def _fused_group(q, k, v, group, layout, dropout_rate, scale):
    q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v))
    causal = layout.visibility is None
    mask = None if causal else visible(group, layout)
    out = F.scaled_dot_product_attention(q_, k_, v_, mask, dropout_rate, is_causal=causal, scale=scale)
    return _cells(out)


def _output_gradient(group: Group, grad: torch.Tensor) -> torch.Tensor:
    """``[g, H, n, dv]`` with the cells behind a row's end set to 0."""
    return _heads_first(group, grad) * group.real()[:, None, :, None]


def _dropped(weights: torch.Tensor, multiplier: torch.Tensor | None) -> torch.Tensor:
    return weights if multiplier is None else weights * multiplier


def _masked_softmax(logits: torch.Tensor, sees: torch.Tensor, blind: bool) -> torch.Tensor:
    """Softmax over the columns that are seen; blind: rows that see none are possible, and become 0."""
    hidden = torch.zeros((), dtype=logits.dtype).masked_fill(~sees, torch.finfo(logits.dtype).min)
    probabilities = torch.softmax(logits.add_(hidden), -1)
    return probabilities.mul_(sees.any(-1, keepdim=True)) if blind else probabilities


class _GroupedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, dropout_rate, scale):
        cells, saved = [], []
        for group in layout.groups:
            q_, k_, v_ = (_heads_first(group, x) for x in (q * scale, k, v))
            out = torch.empty_like(v_)
            for tile in tiles(group, layout):
                logits = torch.matmul(
                    q_[:, :, tile.start : tile.stop], k_[:, :, : tile.keys].transpose(-1, -2)
                )
                probabilities = _masked_softmax(logits, tile.sees, blind=layout.visibility is not None)
                keep = (
                    dropout_multiplier(probabilities.shape, dropout_rate, q) if dropout_rate > 0.0 else None
                )
                out[:, :, tile.start : tile.stop] = _dropped(probabilities, keep) @ v_[:, :, : tile.keys]
                saved += [probabilities, keep]
            cells.append(_cells(out))
        ctx.save_for_backward(q, k, v, *saved)
        ctx.settings = (layout, scale)
        return _ungroup(cells, layout, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        layout, scale = ctx.settings
        grads: tuple[list, list, list] = ([], [], [])
        pairs = iter(zip(saved[::2], saved[1::2]))
        for group in layout.groups:
            q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v))
            d_out = _output_gradient(group, grad)
            d_q, d_k, d_v = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
            for tile in tiles(group, layout):
                p, keep = next(pairs)
                rows, keys = slice(tile.start, tile.stop), slice(0, tile.keys)
                d_v[:, :, keys] += _dropped(p, keep).transpose(-1, -2) @ d_out[:, :, rows]
                d_p = d_out[:, :, rows] @ v_[:, :, keys].transpose(-1, -2)
                d_p = d_p if keep is None else d_p.mul_(keep)
                d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
                d_q[:, :, rows] = d_s @ k_[:, :, keys]
                d_k[:, :, keys] += d_s.transpose(-1, -2) @ q_[:, :, rows]
            for collected, d in zip(grads, (d_q.mul_(scale), d_k.mul_(scale), d_v)):
                collected.append(_cells(d))
        return (*(_ungroup(g, layout, x) for g, x in zip(grads, (q, k, v))), None, None, None)


class _GroupedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, divisor, dropout_rate, *biases):
        cells, keeps = [], []
        for index, group in enumerate(layout.groups):
            q_, k_, v_ = (_heads_first(group, x) for x in (q, k, v / divisor))
            out = torch.empty_like(v_)
            for tile in tiles(group, layout):
                logits = _pointwise_logits(q_, k_, tile, biases[index] if biases else None)
                weights = F.silu(logits, inplace=True).mul_(tile.sees.to(logits.dtype))
                keep = dropout_multiplier(weights.shape, dropout_rate, q) if dropout_rate > 0.0 else None
                out[:, :, tile.start : tile.stop] = _dropped(weights, keep) @ v_[:, :, : tile.keys]
                keeps.append(keep)
            cells.append(_cells(out))
        ctx.save_for_backward(q, k, v, *biases, *keeps)
        ctx.settings = (layout, divisor, len(biases))
        return _ungroup(cells, layout, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *rest = ctx.saved_tensors
        layout, divisor, num_biases = ctx.settings
        biases, keeps = rest[:num_biases], iter(rest[num_biases:])
        grads: tuple[list, list, list] = ([], [], [])
        d_biases = []
        for index, group in enumerate(layout.groups):
            rectangles = tuple(_heads_first(group, x) for x in (q, k, v))
            bias = biases[index] if biases else None
            d_out = _output_gradient(group, grad / divisor)
            *d_qkv, d_bias = _pointwise_group_backward(rectangles, d_out, bias, tiles(group, layout), keeps)
            for collected, d in zip(grads, d_qkv):
                collected.append(_cells(d))
            if bias is not None:
                d_biases.append(d_bias)
        d_tokens = (_ungroup(g, layout, x) for g, x in zip(grads, (q, k, v)))
        return (*d_tokens, None, None, None, *d_biases)


def _pointwise_logits(
    q_: torch.Tensor, k_: torch.Tensor, tile: Tile, bias: torch.Tensor | None
) -> torch.Tensor:
    logits = torch.matmul(q_[:, :, tile.start : tile.stop], k_[:, :, : tile.keys].transpose(-1, -2))
    return logits if bias is None else logits.add_(bias[:, :, tile.start : tile.stop, : tile.keys])


def _pointwise_group_backward(rectangles, d_out, bias, group_tiles, keeps):
    """Gradients of one group by q, k, v and bias; activations are computed again from the logits."""
    q_, k_, v_ = rectangles
    d_q, d_k, d_v = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    d_bias = None if bias is None else torch.zeros_like(bias)
    for tile in group_tiles:
        rows, keys, keep = slice(tile.start, tile.stop), slice(0, tile.keys), next(keeps)
        sees = tile.sees.to(q_.dtype)
        logits = _pointwise_logits(q_, k_, tile, bias)
        weights = F.silu(logits).mul_(sees)
        d_v[:, :, keys] += _dropped(weights, keep).transpose(-1, -2) @ d_out[:, :, rows]
        d_w = d_out[:, :, rows] @ v_[:, :, keys].transpose(-1, -2)
        d_w = (d_w if keep is None else d_w.mul_(keep)).mul_(sees)
        d_s = torch.ops.aten.silu_backward(d_w, logits)
        d_q[:, :, rows] = d_s @ k_[:, :, keys]
        d_k[:, :, keys] += d_s.transpose(-1, -2) @ q_[:, :, rows]
        if d_bias is not None:
            target = d_bias[:, :, rows, keys]
            target += d_s.sum_to_size(target.shape)
    return d_q, d_k, d_v, d_bias
