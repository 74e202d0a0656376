"""Bounds on the memory that a piece of code takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROCESS = Path("/proc/self")


@contextmanager
def memory_grows_at_most(mebibytes: int) -> Iterator[None]:
    """Fails where the peak of this process within the block exceeds its memory before it by more."""
    (PROCESS / "clear_refs").write_text("5")  # the peak so far is forgotten: an earlier one would hide this one's
    before = _peak()
    yield
    assert _peak() - before <= mebibytes << 10


def _peak() -> int:
    """KiB."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation gave, forward and backward, in elements and in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            size = tensor.untyped_storage().nbytes()
            self.numel, self.nbytes = max(self.numel, size // tensor.element_size()), max(self.nbytes, size)
        return result
