"""Floors of a measured piece of work: its own matrix products, made again alone, in torch's operators and at the same
shapes.

What is recorded are the products that the work really makes, forward and back, with the strides of their operands; each
distinct one is then timed by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timing
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv"}
"""Operators that count; sums over bags and sampled products are no dense products and are left out."""


class Form(NamedTuple):
    """All of a tensor but its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        length = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        # Operands may be expanded, so that several places are one number in memory.
        return torch.randn(max(length, 0), dtype=self.dtype).as_strided(self.size, self.stride)


class RecordedProducts(TorchDispatchMode):
    """Counts the products that are made while it is open, by operator and forms of the operands. operations: of
    floats."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in PRODUCTS:
            with self:  # where no gradient is asked for, linear and matmul come as they are
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        else:
            forms = tree_map(_form, (tuple(args), tuple(sorted(kwargs.items()))))
            self.calls[func, forms] += 1
            first, second = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.operations += 2 * first.numel() * (second.shape[-1] if second.dim() > 1 else 1)
        return func(*args, **kwargs)


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Form(tuple(value.shape), value.stride(), value.dtype)
    return value


def products_of(work: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """``seconds`` and ``gflop`` of the products of some work, the fastest of some repeats of each."""
    threads = torch.get_num_threads()
    # Work that is shared out over threads is then done in this one, which alone is recorded.
    torch.set_num_threads(1)
    with RecordedProducts() as recorded:
        work()
    torch.set_num_threads(threads)
    total = 0.0
    for (func, (args, named)), count in recorded.calls.items():
        made = [x.made() if isinstance(x, Form) else x for x in args]
        rest = {name: x.made() if isinstance(x, Form) else x for name, x in named}
        total += count * min(timing.seconds_of(partial(func, *made, **rest), repeats, warmup=0))
    return {"seconds": round(total, 6), "gflop": round(recorded.operations / 1e9, 4)}


def copied_gb_a_second(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes read and written a second by torch's own copy of a tensor that no cache holds."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    best = min(timing.seconds_of(lambda: target.copy_(source), repeats, warmup=0))
    return round(2 * source.nbytes / best / 1e9, 2)
