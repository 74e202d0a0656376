"""Triton kernels of products with sampled rows: the rows of a token, or the tokens of a row, pass through registers
alone.

Every sum is one program's, in the order of the draws, so that every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 32
"""Rows that a program holds at a time."""


@triton.jit
def _products(hidden, weight, rows, out, R: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    state = tl.load(hidden + token * D + column, mask=column < D, other=0.0)
    for first in range(0, R, ROWS):
        draw = first + tl.arange(0, ROWS)
        row = tl.load(rows + token * R + draw, mask=draw < R, other=0)
        mask = (draw[:, None] < R) & (column[None, :] < D)
        held = tl.load(weight + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        tl.store(out + token * R + draw, tl.sum(held * state[None, :], axis=1), mask=draw < R)


@triton.jit
def _sums_of_rows(
    weight, rows, grad, d_hidden, R: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, R, ROWS):
        draw = first + tl.arange(0, ROWS)
        row = tl.load(rows + token * R + draw, mask=draw < R, other=0)
        factor = tl.load(grad + token * R + draw, mask=draw < R, other=0.0)
        mask = (draw[:, None] < R) & (column[None, :] < D)
        held = tl.load(weight + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += tl.sum(held * factor[:, None], axis=0)
    tl.store(d_hidden + token * D + column, total, mask=column < D)


@triton.jit
def _sums_of_tokens(
    hidden, grad, order, starts, d_weight, R: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(start, stop, ROWS):
        place = first + tl.arange(0, ROWS)
        entry = tl.load(order + place, mask=place < stop, other=0)
        factor = tl.load(grad + entry, mask=place < stop, other=0.0)
        mask = (place[:, None] < stop) & (column[None, :] < D)
        held = tl.load(hidden + (entry // R)[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += tl.sum(held * factor[:, None], axis=0)
    tl.store(d_weight + row * D + column, total, mask=column < D)


def products(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``[T, R]``: ``hidden[t] · weight[rows[t, r]]``. hidden: ``[T, D]``; weight: ``[U, D]``; rows: ``[T, R]``
    int64."""
    return _launched(_products, hidden.new_empty(rows.shape), rows.shape[1], hidden, weight, rows)


def sums_of_rows(weight: torch.Tensor, rows: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``[T, D]``: the sum over r of ``grad[t, r] weight[rows[t, r]]``."""
    out = weight.new_empty(len(rows), weight.shape[1])
    return _launched(_sums_of_rows, out, rows.shape[1], weight, rows, grad)


def sums_of_tokens(hidden: torch.Tensor, grad: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """``[U, D]``: the sum of ``grad[t, r] hidden[t]`` over the entries of each row.

    order: ``[T R]`` int64 entries by row; starts: ``[U + 1]`` int64, see `ops.embedding.bags_of_rows`.
    """
    out = hidden.new_empty(len(starts) - 1, hidden.shape[1])
    return _launched(_sums_of_tokens, out, grad.shape[1], hidden, grad, order, starts)


def _launched(kernel: Any, out: torch.Tensor, draws: int, matrix: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """``out``, filled by a program for each of its rows. matrix: ``[n, D]``."""
    width = matrix.shape[1]
    if out.numel():
        columns = triton.next_power_of_2(width)
        kernel[(len(out),)](matrix, *others, out, R=draws, D=width, COLUMNS=columns, ROWS=_ROWS, num_warps=2)
    return out
