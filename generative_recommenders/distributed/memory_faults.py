"""Failed allocations as one line that names the settings to change."""

from __future__ import annotations

import torch

_CPU_MARKS = ("DefaultCPUAllocator", "Storage size calculation overflowed")
"""PyTorch's CPU allocator has no error class of its own; one of these stands in the message."""


def out_of_memory(error: BaseException) -> str | None:
    """The line for a failed allocation by Python, pyarrow or PyTorch on a CPU or GPU; None for any other error."""
    text = str(error)
    place = max(text.find(mark) for mark in _CPU_MARKS) if isinstance(error, RuntimeError) else -1
    if place < 0 and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return None
    reason = " ".join(text[max(place, 0) :].split())[:200] or "an allocation failed"
    return (
        f"out of memory ({reason}): lower train_fn.local_batch_size, eval_batch_size, num_negatives or the "
        "sizes of the model, or use fewer processes"
    )
