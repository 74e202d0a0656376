"""Conversions between jagged tokens and padded rectangles: fbgemm's operators where they run, plain torch elsewhere.

``values [T, ...]`` with ``offsets [B + 1]`` int64 is the jagged form, ``[B, N, ...]``, right-padded with 0, the padded one.
Both ways give the same numbers and gradients. Times of both: benchmarks/jagged.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging as python_logging

import torch
from absl import logging

from generative_recommenders.ops import dispatch

_IMPORT_FAULTS = (
    ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError, AssertionError,
)  # fmt: skip
"""What libraries built for another torch raise while they register their operators, or at the first call."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_DTYPES, torch.int64, torch.int32)


def fbgemm_fault(device_type: str) -> str | None:
    """Why fbgemm cannot be used on such a device; None where it can."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "it is not installed"
    before = python_logging.root.manager.disable
    python_logging.disable(python_logging.CRITICAL)  # an import that fails prints and logs pages
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module("fbgemm_gpu")
            one = torch.ones(1, 1, 1, device=device_type)  # a mismatched pair may fail at its first call only
            torch.ops.fbgemm.dense_to_jagged(one, [torch.tensor([0, 1], device=device_type)], 1)
    except _IMPORT_FAULTS as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        python_logging.disable(before)
    return None


@functools.cache
def fbgemm_runs_on(device_type: str) -> bool:
    """Whether fbgemm works on such a device; an installation that does not is named in one warning."""
    fault = fbgemm_fault(device_type)
    if fault is not None and importlib.util.find_spec("fbgemm_gpu") is not None:
        logging.warning(
            "fbgemm_gpu does not work with torch %s on %s, plain torch takes its place: %s",
            torch.__version__, device_type, fault,
        )  # fmt: skip
    return fault is None


def _takes_fbgemm(x: torch.Tensor) -> bool:
    dtypes = _CPU_DTYPES if x.device.type == "cpu" else _DTYPES
    return dispatch.fast(x) and x.dtype in dtypes and x.numel() > 0 and fbgemm_runs_on(x.device.type)


def jagged_to_padded(values: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
    """``[T, ...]`` to ``[B, N, ...]``; rows longer than N are cut at the end."""
    if not _takes_fbgemm(values):
        return jagged_to_padded_reference(values, offsets, max_length)
    rows = values.reshape(len(values), -1)
    dense = torch.ops.fbgemm.jagged_to_padded_dense(rows, [offsets], [max_length], 0.0)
    return dense.view(len(offsets) - 1, max_length, *values.shape[1:])


def jagged_to_padded_reference(values: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
    """`jagged_to_padded` in plain torch. Tokens go to their cells by number, since a boolean index would wait for a GPU."""
    cells, num_tokens = (len(offsets) - 1) * max_length, len(values)
    rows = torch.arange(len(offsets) - 1, device=values.device)
    row_of = torch.repeat_interleave(rows, offsets.diff(), output_size=num_tokens)
    column = torch.arange(num_tokens, device=values.device) - offsets[row_of]
    # Cut tokens go to a cell of their own, behind all others.
    cell = torch.where(column < max_length, row_of * max_length + column, cells)
    out = values.new_zeros(cells + 1, *values.shape[1:]).index_copy(0, cell, values)
    return out[:-1].view(len(offsets) - 1, max_length, *values.shape[1:])


def padded_to_jagged(dense: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[B, N, ...]`` to ``[T, ...]``; num_tokens is T, known to the caller so that no device has to be asked."""
    if not _takes_fbgemm(dense):
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


def row_positions(offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[T]`` int64: place of each token in its row, from 0."""
    if not _takes_fbgemm(offsets) or num_tokens == 0:
        return row_positions_reference(offsets, num_tokens)
    return torch.ops.fbgemm.offsets_range(offsets[:-1], num_tokens)


def row_positions_reference(offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`row_positions` in plain torch."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=offsets.device) - starts
