"""Triton kernels of layer norm without weights over narrow rows, which torch's own handles a row a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_WIDTH = 1024
"""Columns of a row, at most: it is held whole."""
_CELLS = 2048
"""Of a program: its rows times columns."""


@triton.jit
def _forward(x, y, inverse, rows, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < WIDTH)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, values - (tl.sum(values, axis=1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    tl.store(y + place, centred * scale[:, None], mask=mask)
    tl.store(inverse + row, scale, mask=row < rows)


@triton.jit
def _backward(y, inverse, d_y, d_x, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """``dx = (dy - mean dy - y mean(y dy)) / sigma``."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < WIDTH)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    values = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    gradients = tl.load(d_y + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)
    mean, along = tl.sum(gradients, axis=1) / WIDTH, tl.sum(gradients * values, axis=1) / WIDTH
    gradients = (gradients - mean[:, None] - values * along[:, None]) * scale[:, None]
    tl.store(d_x + place, gradients, mask=mask)


class FusedLayerNorm(torch.autograd.Function):
    """Layer norm of ``x [..., D]`` without weights."""

    @staticmethod
    def forward(ctx, x, eps):
        x = x.contiguous()
        y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        inverse = x.new_empty(rows, dtype=torch.float32)
        ctx.launch = _launch(rows, x.shape[-1])
        if rows:
            grid, constants = ctx.launch
            _forward[grid](x, y, inverse, rows, eps, **constants)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = torch.empty_like(y)
        if len(inverse):
            grid, constants = ctx.launch
            _backward[grid](y, inverse, grad, d_x, len(inverse), **constants)
        return d_x, None


def _launch(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    columns = triton.next_power_of_2(width)
    rows_each = max(1, _CELLS // columns)
    return (triton.cdiv(rows, rows_each),), {"WIDTH": width, "COLUMNS": columns, "ROWS": rows_each}
