"""Triton kernels of a statistic over the whole catalogue, whose logits are never written to memory.

A program holds a tile of tokens and walks over a segment of the items (forward, gradient of the states), or a tile of
items and walks over a segment of the tokens (gradient of the items). The backward pass computes the logits again: five
products in all where the kept logits of `catalogue_sum` take three, for no memory and no passes over it. Segments are
added up in their order, without atomics, so that every run gives the same bits. The idea is that of Cut Cross-Entropy
(arXiv 2411.09009).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from generative_recommenders.ops import dispatch

WIDEST = 128
"""The widest states and items D that the kernels take: beyond, products of kept logits are faster (measured on an
H200)."""
_TILE = {"tf32": 64, "ieee": 32}
"""Tokens, and items, of a program's tile; more of them in exact products would not fit into registers."""
_PROGRAMS = 1024
"""Programs that a launch is cut into, where there is so much work."""


@triton.jit
def _rows(matrix, row, count, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[row]`` of a matrix ``[count, D]``, zeros beyond its ends."""
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < count) & (column[None, :] < D)
    return tl.load(matrix + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(states, items, token, item, excluded, T, V, P: tl.constexpr, PRECISION: tl.constexpr):
    """``[tokens, items]``; -inf at items beyond the last and at those that a token excludes."""
    x = tl.dot(states, tl.trans(items), input_precision=PRECISION)
    x = tl.where(item[None, :] < V, x, float("-inf"))
    for place in range(P):
        out = tl.load(excluded + token * P + place, mask=token < T, other=-1)
        x = tl.where(item[None, :] == out[:, None], float("-inf"), x)
    return x


@triton.jit
def _statistics(
    hidden, weight, excluded, partial, T, V, segment,
    D: tl.constexpr, P: tl.constexpr, EXPONENTIAL: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    start = tl.program_id(1).to(tl.int64) * segment
    states = _rows(hidden, token, T, D, COLUMNS)
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for first in range(0, segment, ITEMS):
        item = start + first + tl.arange(0, ITEMS)
        items = _rows(weight, item, V, D, COLUMNS)
        x = _logits(states, items, token, item, excluded, T, V, P, PRECISION)
        if EXPONENTIAL:
            higher = tl.maximum(top, tl.max(x, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but excluded items so far
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
            top = higher
        else:
            total += tl.sum(tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))), 1)
    if EXPONENTIAL:  # a total that is not a number stays none
        total = tl.where(total == 0.0, float("-inf"), top + tl.log(total))
    tl.store(partial + tl.program_id(1).to(tl.int64) * T + token, total, mask=token < T)


@triton.jit
def _slopes(x, statistic, EXPONENTIAL: tl.constexpr):
    """Derivative of the statistic by each logit: exp(x - statistic), or sigmoid(x)."""
    if EXPONENTIAL:
        slope = tl.exp(x - statistic[:, None])
    else:
        slope = 1.0 / (1.0 + tl.exp(-x))
    return slope


@triton.jit
def _by_states(
    hidden, weight, excluded, statistics, grads, partial, T, V, segment,
    D: tl.constexpr, P: tl.constexpr, EXPONENTIAL: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    token, column = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    start = tl.program_id(1).to(tl.int64) * segment
    states = _rows(hidden, token, T, D, COLUMNS)
    statistic = tl.load(statistics + token, mask=token < T, other=0.0)
    grad = tl.load(grads + token, mask=token < T, other=0.0)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for first in range(0, segment, ITEMS):
        item = start + first + tl.arange(0, ITEMS)
        items = _rows(weight, item, V, D, COLUMNS)
        x = _logits(states, items, token, item, excluded, T, V, P, PRECISION)
        slope = _slopes(x, statistic, EXPONENTIAL) * grad[:, None]
        total += tl.dot(slope, items, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * T + token)[:, None] * D + column[None, :]
    tl.store(partial + place, total, mask=(token[:, None] < T) & (column[None, :] < D))


@triton.jit
def _by_items(
    hidden, weight, excluded, statistics, grads, partial, T, V, segment,
    D: tl.constexpr, P: tl.constexpr, EXPONENTIAL: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    item, column = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS), tl.arange(0, COLUMNS)
    start = tl.program_id(1).to(tl.int64) * segment
    items = _rows(weight, item, V, D, COLUMNS)
    total = tl.zeros([ITEMS, COLUMNS], tl.float32)
    for first in range(0, segment, TOKENS):
        token = start + first + tl.arange(0, TOKENS)
        states = _rows(hidden, token, T, D, COLUMNS)
        x = _logits(states, items, token, item, excluded, T, V, P, PRECISION)
        statistic = tl.load(statistics + token, mask=token < T, other=0.0)
        grad = tl.load(grads + token, mask=token < T, other=0.0)
        slope = _slopes(x, statistic, EXPONENTIAL) * grad[:, None]
        total += tl.dot(tl.trans(slope), states, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * V + item)[:, None] * D + column[None, :]
    tl.store(partial + place, total, mask=(item[:, None] < V) & (column[None, :] < D))


class _Statistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, excluded, exponential):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        places = hidden if excluded is None else excluded.contiguous()  # not read where none is excluded
        precision = dispatch.kernels_precision(hidden)
        tile, columns = _TILE[precision], max(16, triton.next_power_of_2(hidden.shape[1]))
        shapes = {
            "D": hidden.shape[1],
            "P": 0 if excluded is None else excluded.shape[1],
            "EXPONENTIAL": exponential,
            "PRECISION": precision,
            "COLUMNS": columns,  # 16 is the least width of a product of tiles
            "TOKENS": tile,
            "ITEMS": tile,
            "num_warps": 4,
            # three of 128 columns exceed the 99 KiB of shared memory that consumer cards have
            "num_stages": 3 if columns <= 64 else 2,
        }
        tiles, segments, segment = _cut(len(hidden), len(weight), tile)
        partial = hidden.new_empty(segments, len(hidden))
        _statistics[(tiles, segments)](hidden, weight, places, partial, len(hidden), len(weight), segment, **shapes)
        statistic = partial.logsumexp(0) if exponential else partial.sum(0)
        ctx.save_for_backward(hidden, weight, places, statistic)
        ctx.shapes = shapes
        return statistic

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, places, statistic = ctx.saved_tensors
        nothing = statistic == -torch.inf  # all items are excluded: no logit moves it
        counts = len(hidden), len(weight)
        inputs = hidden, weight, places, statistic.masked_fill(nothing, 0.0), grad.masked_fill(nothing, 0.0)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            tiles, segments, segment = _cut(counts[0], counts[1], ctx.shapes["ITEMS"])
            partial = hidden.new_empty(segments, *hidden.shape)
            _by_states[(tiles, segments)](*inputs, partial, *counts, segment, **ctx.shapes)
            d_hidden = partial.sum(0)
        if ctx.needs_input_grad[1]:
            tiles, segments, segment = _cut(counts[1], counts[0], ctx.shapes["TOKENS"])
            partial = weight.new_empty(segments, *weight.shape)
            _by_items[(tiles, segments)](*inputs, partial, *counts, segment, **ctx.shapes)
            d_weight = partial.sum(0) if segments > 1 else partial[0]
        return d_hidden, d_weight, None, None


def _cut(outer: int, inner: int, tile: int) -> tuple[int, int, int]:
    """Tiles of ``outer``, segments of ``inner``, and the length of a segment, a multiple of ``tile``."""
    tiles, steps = triton.cdiv(outer, tile), triton.cdiv(inner, tile)
    each = max(triton.cdiv(steps, max(1, _PROGRAMS // tiles)), min(steps, 8))
    return tiles, triton.cdiv(steps, each), each * tile


def takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels are written for these shapes and dtypes."""
    return hidden.dtype == weight.dtype == torch.float32 and hidden.shape[1] <= WIDEST and hidden.numel() > 0


def statistic(
    hidden: torch.Tensor, weight: torch.Tensor, excluded: torch.Tensor | None, exponential: bool
) -> torch.Tensor:
    """``[T]``: ``ln sum_v exp(x_v)`` (exponential) or ``sum_v softplus(x_v)`` of the logits ``x = h W^T``, once
    differentiable.

    hidden: ``[T, D]`` float32. weight: ``[V, D]`` float32. excluded: ``[T, P]`` int64 items left out of a token's sum
    (-1 = none), or None. Products are TF32 where torch's are.
    """
    return _Statistic.apply(hidden, weight, excluded, exponential)
