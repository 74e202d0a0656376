"""Bound on the memory that a piece of code takes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_grows_at_most(mebibytes: int) -> Iterator[None]:
    """Fails where the peak of this process rises by more within the block."""
    before = _peak()
    yield
    assert _peak() - before <= mebibytes << 10


def _peak() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
