"""Causal attention on a GPU by the kernels of `ops.attention.kernels`: one launch forward, two back, one for a bias."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention import kernels
from generative_recommenders.ops.attention.tiles import PairBias
from generative_recommenders.ops.layout import Layout

_PROGRAMS = (
    (32, 16, {"num_warps": 2, "num_stages": 2}),
    (64, 32, {"num_warps": 4, "num_stages": 2}),
    (128, 16, {"num_warps": 4, "num_stages": 2}),
    (256, 16, {"num_warps": 8, "num_stages": 1}),
)
"""For heads up to a width: queries, and keys, of a program. The first two are the fastest of those tried on an H200,
where larger ones leave too few programs on a multiprocessor. The others keep a program within the registers and the
99 KiB of shared memory that consumer cards have, too (`tests/ops/compiled_kernels.py`)."""
_DIAGONALS, _QUERIES = 16, 16
"""Of a program that sums gradients of a bias."""


class Weights(NamedTuple):
    """The weights of logits: softmax(logit_scale q kᵀ), or silu(q kᵀ + bias) / divisor."""

    softmax: bool
    logit_scale: float = 1.0
    divisor: float = 1.0
    dropout_rate: float = 0.0


class _Launch(NamedTuple):
    """Programs of a launch, numbers that the kernels are given, and what they are compiled for."""

    grid: tuple[int, int, int]
    numbers: tuple[float, ...]
    options: dict[str, Any]


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    weights: Weights,
    bias: PairBias | None = None,
) -> torch.Tensor:
    """``[T, H, dv]`` attended values of a causal layout. q, k: ``[T, H, d]``, v: ``[T, H, dv]``, not float64 and
    at most 256 wide."""
    position, time, buckets = bias or (None, None, None)
    return _FusedAttention.apply(q, k, v, layout, weights, buckets, position, time)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, weights, buckets, position, time):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        launch = _launch(q, k, v, layout, weights, position, time)
        seed = torch.randint(2**31 - 1, (1,), device=q.device) if weights.dropout_rate else None
        # cells of a padded layout that hold no token are no row's: 0, not what the memory held
        out = (torch.empty if layout.valid is None else torch.zeros)(v.shape, dtype=v.dtype, device=v.device)
        normalisers = q.new_empty(q.shape[:2] if weights.softmax else 0, dtype=torch.float32)
        tables = (layout.starts, layout.lengths, position, time, buckets, seed)
        if v.numel():
            kernels.forward[launch.grid](q, k, v, out, normalisers, *tables, *launch.numbers, **launch.options)
        ctx.save_for_backward(q, k, v, out if weights.softmax else None, normalisers, *tables)
        ctx.settings = layout, launch
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, normalisers, *tables = ctx.saved_tensors
        layout, launch = ctx.settings
        position, time, buckets = tables[2:5]
        d_out = d_out.contiguous()
        make = torch.empty if layout.valid is None else torch.zeros
        d_q, d_k, d_v = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        width, rows, heads = layout.longest, layout.num_rows, q.shape[1]
        cells = 0 if position is None else rows * heads * width * width
        d_logits = q.new_empty(cells, dtype=torch.float32)
        if v.numel():
            rest = *tables, *launch.numbers
            kernels.backward_queries[launch.grid](
                q, k, v, out, normalisers, d_out, d_q, d_logits, *rest, **launch.options
            )
            kernels.backward_keys[launch.grid](q, k, v, out, normalisers, d_out, d_k, d_v, *rest, **launch.options)
        d_position = d_time = None
        if position is not None:
            chunks, parts = triton.cdiv(width, _QUERIES), triton.cdiv(width, _DIAGONALS)
            by_diagonal = d_logits.new_empty(rows * chunks, width)
            by_bucket = None if time is None else d_logits.new_empty(rows * chunks * parts, len(time))
            if rows * width:
                kernels.sum_bias[(parts, chunks, rows)](
                    d_logits, buckets, layout.lengths, by_diagonal, by_bucket, width,
                    H=heads, HAS_TIME=time is not None, DIAGONALS=_DIAGONALS, QUERIES=_QUERIES, num_warps=1,
                )  # fmt: skip
            reach = (len(position) + 1) // 2
            d_position = torch.zeros_like(position)
            d_position[reach - width : reach] = by_diagonal.sum(0).flip(0)
            d_time = None if by_bucket is None else by_bucket.sum(0)
        return d_q, d_k, d_v, None, None, None, d_position, d_time


def _launch(q, k, v, layout: Layout, weights: Weights, position, time) -> _Launch:
    (_, heads, dqk), dv = q.shape, v.shape[2]
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 1)]
    reach = 0 if position is None else (len(position) + 1) // 2
    kept_share = 1.0 - weights.dropout_rate
    scales = weights.logit_scale, 1.0 / (weights.divisor * kept_share), weights.dropout_rate
    # 16 is the least width of a product of tiles.
    block_qk, block_v = (max(16, triton.next_power_of_2(x)) for x in (dqk, dv))
    block, sizes = next((block, sizes) for width, block, sizes in _PROGRAMS if max(block_qk, block_v) <= width)
    options = sizes | {
        "H": heads,
        "DQK": dqk,
        "DV": dv,
        "BQK": block_qk,
        "BV": block_v,
        "SOFTMAX": weights.softmax,
        "HAS_POSITION": position is not None,
        "HAS_TIME": time is not None,
        "DROPOUT": weights.dropout_rate > 0.0,
        "PRECISION": dispatch.kernels_precision(q),
        "BLOCK": block,
    }
    grid = triton.cdiv(layout.longest, block), heads, layout.num_rows
    return _Launch(grid, (*strides, layout.longest, reach, *scales), options)
