"""Choice between fast operations and their plain references, by device and installed libraries."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging as python_logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from absl import logging

from generative_recommenders.errors import first_line
from generative_recommenders.ops import numbered_rows

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_VNNI = hasattr(torch, "_int_mm") and torch.cpu._is_vnni_supported()

_FBGEMM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FBGEMM_CPU_DTYPES = (*_FBGEMM_DTYPES, torch.int64, torch.int32)

_references_wanted: list[bool] = []
"""One entry for each `references` that is open."""


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Every operation takes its plain reference here, whatever the device: to export a model, to look at the weights of
    its attention, and for tests."""
    _references_wanted.append(True)
    try:
        yield
    finally:
        _references_wanted.pop()


def fast() -> bool:
    """Whether fast operations are taken, and not their references."""
    return not _references_wanted


def fast_on_cpu(x: torch.Tensor) -> bool:
    """Whether operations written for a CPU are taken for ``x``."""
    return fast() and x.device.type == "cpu"


def fast_on_cpu_in_one_dtype(x: torch.Tensor) -> bool:
    """As `fast_on_cpu`, but not under autocast: for operations whose products it would not reach."""
    return fast_on_cpu(x) and not torch.is_autocast_enabled("cpu")


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether Triton's kernels are taken for ``x``: they draw masks of their own, so not where rows are numbered."""
    return fast() and numbered_rows.current() is None and x.device.type == "cuda" and _HAS_TRITON


def since_ampere(x: torch.Tensor) -> bool:
    """Whether kernels may use TF32 and 99 KiB of shared memory; in Triton's interpreter, on a CPU, they may."""
    return x.device.type == "cpu" or torch.cuda.get_device_capability(x.device) >= (8, 0)


def kernels_precision(x: torch.Tensor) -> Literal["tf32", "ieee"]:
    """How kernels multiply float32: as torch's products do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and since_ampere(x) else "ieee"


def takes_fbgemm(x: torch.Tensor) -> bool:
    """Whether fbgemm's jagged operators are taken for ``x``; those for CUDA do not take integers."""
    dtypes = _FBGEMM_CPU_DTYPES if x.device.type == "cpu" else _FBGEMM_DTYPES
    return fast() and x.dtype in dtypes and x.numel() > 0 and fbgemm_runs_on(x.device.type)


def fbgemm_fault(device_type: str) -> str | None:
    """Why fbgemm cannot be used on such a device; None where it can."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "it is not installed"
    root = python_logging.root
    before, handlers = root.manager.disable, root.handlers[:]
    python_logging.disable(python_logging.CRITICAL)  # an import that fails prints and logs pages
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module("fbgemm_gpu")
            one = torch.ones(1, 1, 1, device=device_type)  # a mismatched pair may fail at its first call only
            torch.ops.fbgemm.dense_to_jagged(one, [torch.tensor([0, 1], device=device_type)], 1)
    except Exception as error:  # a library built for another torch raises anything
        return first_line(error)
    finally:
        python_logging.disable(before)
        root.handlers[:] = handlers  # a first log sets logging up, here to write where nobody reads
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


def multiplies_integers(x: torch.Tensor) -> bool:
    """Whether torch multiplies 8-bit integers faster than floats on the device of ``x``.

    That is on CPUs with AVX-512 VNNI; without it sums saturate, or every product is made alone.
    """
    return fast_on_cpu(x) and _HAS_VNNI


def waits(x: torch.Tensor) -> bool:
    """Whether reading a number of ``x`` waits for an accelerator."""
    return x.device.type != "cpu"


def autocast(at: torch.Tensor | torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to dtype on a tensor's device; None switches autocast off."""
    device = at if isinstance(at, torch.device) else at.device
    if dtype is None and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # which an exporter does not see
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def computed_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that products of ``x`` are computed in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
