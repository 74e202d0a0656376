"""Jagged <-> padded conversions: fbgemm's operators where a working fbgemm is installed, plain torch elsewhere.

``values [T, D]`` with ``offsets [B + 1]`` int64 is the jagged form, ``[B, N, D]`` the padded one. Both backends give the
same numbers. Integer, float64 and 1-d data take the plain path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging as python_logging
import os
from collections.abc import Iterator

import torch
from absl import logging

DISABLE_VARIABLE = "GENERATIVE_RECOMMENDERS_NO_FBGEMM"
"""Set to 1 to use the plain torch path although fbgemm is installed."""

_IMPORT_FAULTS = (
    ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError, AssertionError,
)  # fmt: skip
"""What libraries made for another torch raise while they register their operators."""
_FBGEMM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def backend() -> tuple[str, str]:
    """(name, why): ``("fbgemm", ...)`` or ``("torch", ...)``, decided once a process."""
    if os.environ.get(DISABLE_VARIABLE) == "1":
        return "torch", f"{DISABLE_VARIABLE}=1"
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "torch", "fbgemm_gpu is not installed"
    versions = f"{_fbgemm_version()} does not fit torch {torch.__version__}"
    try:
        with _quiet():
            importlib.import_module("fbgemm_gpu")
            _probe()
    except _IMPORT_FAULTS as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return "torch", f"the installed {versions}: {first_line}"
    return "fbgemm", f"{_fbgemm_version()} with torch {torch.__version__}"


def _fbgemm_version() -> str:
    for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "fbgemm_gpu"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a library says while it is tried goes nowhere: the log has one line of it."""
    before = python_logging.root.manager.disable
    python_logging.disable(python_logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        python_logging.disable(before)


def log_backend() -> None:
    """Says once which backend runs, and names a mismatched fbgemm/torch pair in one line."""
    name, why = backend()
    log = logging.warning if "does not fit" in why else logging.info
    log("jagged operators: %s (%s)", name, why)


def jagged_to_padded(values: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
    """``[T, ...]`` to ``[B, N, ...]``, right-padded with 0; rows longer than N are cut at the end."""
    if values.dim() == 2 and _fits_fbgemm(values):
        return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [max_length], 0.0)
    lengths = (offsets[1:] - offsets[:-1]).clamp(max=max_length)
    columns = torch.arange(max_length, device=values.device)
    real = columns < lengths[:, None]
    out = values.new_zeros(lengths.numel(), max_length, *values.shape[1:])
    out[real] = values[(offsets[:-1, None] + columns)[real]]
    return out


def padded_to_jagged(dense: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[B, N, ...]`` to ``[T, ...]``; num_tokens is T, known to the caller so that no device has to be asked."""
    if dense.dim() == 3 and _fits_fbgemm(dense):
        return torch.ops.fbgemm.dense_to_jagged(dense, [offsets], num_tokens)[0]
    lengths = offsets[1:] - offsets[:-1]
    rows = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=dense.device), lengths, output_size=num_tokens
    )
    columns = torch.arange(num_tokens, device=dense.device) - offsets[rows]
    return dense.flatten(0, 1).index_select(0, rows * dense.shape[1] + columns)


def _fits_fbgemm(x: torch.Tensor) -> bool:
    return x.dtype in _FBGEMM_DTYPES and x.numel() > 0 and backend()[0] == "fbgemm"


def _probe() -> None:
    """One tiny round trip: a mismatched pair imports, then fails on its first operator."""
    offsets = torch.tensor([0, 1, 3])
    values = torch.arange(6.0).view(3, 2)
    dense = torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [2], 0.0)
    back = torch.ops.fbgemm.dense_to_jagged(dense, [offsets], 3)[0]
    if not torch.equal(values, back):
        raise RuntimeError("jagged round trip gave other numbers")
