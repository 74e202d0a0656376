"""Choice between fast operations and their plain references, by device and installed libraries."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from generative_recommenders.ops import numbered_rows

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_VNNI = hasattr(torch, "_int_mm") and torch.cpu._is_vnni_supported()

_references_wanted: list[bool] = []
"""One entry for each `references` that is open."""


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Every operation takes its plain reference here, whatever the device; for tests and comparisons."""
    _references_wanted.append(True)
    try:
        yield
    finally:
        _references_wanted.pop()


def fast(x: torch.Tensor) -> bool:
    """Whether operations that are fast on every device are taken for ``x``."""
    return not _references_wanted


def fast_on_cpu(x: torch.Tensor) -> bool:
    """Whether operations written for a CPU are taken for ``x``."""
    return fast(x) and x.device.type == "cpu"


def fast_on_cpu_in_one_dtype(x: torch.Tensor) -> bool:
    """As `fast_on_cpu`, for operations whose products autocast would not reach: not under autocast."""
    return fast_on_cpu(x) and not torch.is_autocast_enabled("cpu")


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether Triton's kernels are taken for ``x``: they draw masks of their own, so not where rows are numbered."""
    return fast(x) and numbered_rows.current() is None and x.device.type == "cuda" and _HAS_TRITON


def multiplies_integers(x: torch.Tensor) -> bool:
    """Whether torch multiplies 8-bit integers faster than floats on the device of ``x``.

    That is on CPUs with AVX-512 VNNI; without it sums saturate, or every product is made alone.
    """
    return fast_on_cpu(x) and _HAS_VNNI


def waits(x: torch.Tensor) -> bool:
    """Whether reading a number of ``x`` waits for an accelerator."""
    return x.device.type != "cpu"


def autocast(at: torch.Tensor | torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to dtype on a tensor's device; None switches autocast off."""
    device = at if isinstance(at, torch.device) else at.device
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def computed_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that products of ``x`` are computed in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
