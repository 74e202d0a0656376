"""Conversions between jagged tokens and padded rectangles: fbgemm's operators where they run, plain torch elsewhere.

``values [T, ...]`` with ``offsets [B + 1]`` int64 is the jagged form, ``[B, N, ...]``, right-padded with 0, the padded
one. Both ways give the same numbers and gradients. Times of both: benchmarks/jagged.py.
"""

from __future__ import annotations

import torch

from generative_recommenders.ops import dispatch


def jagged_to_padded(values: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
    """``[T, ...]`` to ``[B, N, ...]``; rows longer than N are cut at the end."""
    if not dispatch.takes_fbgemm(values):
        return jagged_to_padded_reference(values, offsets, max_length)
    rows = values.reshape(len(values), -1)
    dense = torch.ops.fbgemm.jagged_to_padded_dense(rows, [offsets], [max_length], 0.0)
    return dense.view(len(offsets) - 1, max_length, *values.shape[1:])


def jagged_to_padded_reference(values: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
    """`jagged_to_padded` in plain torch. Tokens go to their cells by number, since a boolean index would wait for a
    GPU."""
    cells, num_tokens = (len(offsets) - 1) * max_length, len(values)
    rows = torch.arange(len(offsets) - 1, device=values.device)
    row_of = torch.repeat_interleave(rows, offsets.diff(), output_size=num_tokens)
    column = torch.arange(num_tokens, device=values.device) - offsets[row_of]
    # Cut tokens go to a cell of their own, after all others.
    cell = torch.where(column < max_length, row_of * max_length + column, cells)
    out = values.new_zeros(cells + 1, *values.shape[1:]).index_copy(0, cell, values)
    return out[:-1].view(len(offsets) - 1, max_length, *values.shape[1:])


def padded_to_jagged(dense: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[B, N, ...]`` to ``[T, ...]``; num_tokens is T, known to the caller so that no device has to be asked."""
    if not dispatch.takes_fbgemm(dense):
        return padded_to_jagged_reference(dense, offsets, num_tokens)
    cells = dense.reshape(*dense.shape[:2], -1)
    values, _ = torch.ops.fbgemm.dense_to_jagged(cells, [offsets], num_tokens)
    return values.view(num_tokens, *dense.shape[2:])


def padded_to_jagged_reference(dense: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`padded_to_jagged` in plain torch."""
    first_cells = torch.arange(len(dense), device=dense.device) * dense.shape[1]
    of_rows = torch.repeat_interleave(first_cells - offsets[:-1], offsets.diff(), output_size=num_tokens)
    cells = of_rows + torch.arange(num_tokens, device=dense.device)
    return dense.flatten(0, 1).index_select(0, cells)
