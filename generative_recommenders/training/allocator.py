"""Keeps freed memory in the process, in huge pages, so that a step neither asks the system for the same large tensors again
nor spends its time on the translation of addresses.

glibc gives blocks above a threshold back at once and gets them zeroed, page by page, at the next request; keeping them took an
eighth to a quarter off a training step on a CPU. Where Linux gives huge pages to those who ask (the usual setting, "madvise" in
/sys/kernel/mm/transparent_hugepage/enabled), asking took another twenty-fifth off (ML-1M, SASRec, 128 negatives a block).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MMAP_BYTES = 1 << 30
_TRIM_BYTES = -1  # never
_HUGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14  # of madvise(2)
_HEAP_BLOCKS, _HEAP_BLOCK_BYTES = (
    4,
    _MMAP_BYTES - (1 << 16),
)  # below the threshold, so that malloc takes them from its heap


def keep_freed_memory() -> bool:
    """Raises glibc's thresholds; False where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except AttributeError:
        return False
    if not (mallopt(_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)):
        return False
    _ask_for_huge_pages(libc)
    return True


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For the next addresses of the heap: they are reserved and given back to malloc untouched."""
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
