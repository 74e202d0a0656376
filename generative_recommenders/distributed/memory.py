"""Memory of a process: settings of the C library's allocator, and failed allocations as one line."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MMAP_BYTES = 1 << 30
_TRIM_BYTES = -1  # never
_HUGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14  # of madvise(2)
_HEAP_BLOCKS = 4
_HEAP_BLOCK_BYTES = _MMAP_BYTES - (1 << 16)  # below the threshold, so that malloc takes them from its heap
_CPU_MARKS = ("DefaultCPUAllocator", "Storage size calculation overflowed")
"""PyTorch's CPU allocator has no error class of its own; one of these stands in the message."""


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory in the process, in huge pages; does nothing where the C library is another one.

    By default glibc returns blocks above a threshold to the system at once and gets them back zeroed, page by page, at
    the next request; keeping them took an eighth to a quarter off a training step on a CPU. Huge pages save the
    translation of addresses: where Linux gives them to those who ask (the usual setting, "madvise" in
    /sys/kernel/mm/transparent_hugepage/enabled), asking took another twenty-fifth off (ML-1M, SASRec, 128 negatives a
    block).
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return
    if not (mallopt(_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)):
        return
    # Huge pages are asked for by address, before there are tensors: the next blocks of the heap are reserved, marked
    # and freed again, so that malloc serves later requests from them.
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = [libc.malloc(_HEAP_BLOCK_BYTES) for _ in range(_HEAP_BLOCKS)]
    for block in filter(None, blocks):
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        stop = (block + _HEAP_BLOCK_BYTES) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(start, stop - start, _MADV_HUGEPAGE)
    for block in reversed(blocks):
        libc.free(block)


def out_of_memory(error: BaseException) -> str | None:
    """The line for a failed allocation by Python, pyarrow or PyTorch on a CPU or GPU; None for any other error."""
    text = str(error)
    place = max(text.find(mark) for mark in _CPU_MARKS) if isinstance(error, RuntimeError) else -1
    torch = sys.modules.get("torch")  # a program that has not imported it has no error of its kind
    kinds = (MemoryError, *([torch.OutOfMemoryError] if torch else []))
    if place < 0 and not isinstance(error, kinds):
        return None
    reason = " ".join(text[max(place, 0) :].split())[:200] or "an allocation failed"
    return (
        f"out of memory ({reason}): lower train_fn.local_batch_size, eval_batch_size, num_negatives or the "
        "sizes of the model, or use fewer processes"
    )
