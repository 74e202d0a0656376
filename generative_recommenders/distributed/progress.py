"""Progress bars with the remaining time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Between two drawings of a bar, on a terminal and in a file; work that is shorter shows none."""


def progress_bar(items: Iterable[T], total: int, description: str, done: int = 0, shown: bool = True) -> Iterable[T]:
    """``items``, shown by a progress bar on standard error: how many of ``total`` are done, the speed, the remaining
    time.

    done: how many were done before (a resumed epoch); they do not count as speed. shown: False on all processes but the
    main one.
    """
    seconds = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        items, description, total, initial=done, disable=not shown, delay=seconds, mininterval=seconds,
        maxinterval=seconds, leave=False, dynamic_ncols=True,
    )  # fmt: skip
