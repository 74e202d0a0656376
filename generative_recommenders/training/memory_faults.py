"""A failed allocation as one line that says what to change."""

from __future__ import annotations

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""PyTorch's CPU allocator has no error class of its own; its name stands in the message."""


def out_of_memory(error: BaseException) -> str | None:
    """The line for a failed allocation by Python, pyarrow or PyTorch on a CPU or GPU; None for any other error."""
    allocator = isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    if not (allocator or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
        return None
    text = str(error)
    reason = " ".join(text[max(text.find(_CPU_ALLOCATOR), 0) :].split())[:200] or "an allocation failed"
    return (
        f"out of memory ({reason}): lower train_fn.local_batch_size, eval_batch_size or num_negatives, "
        "or use fewer processes"
    )
