"""Work in parts, each done by a thread of one core.

torch splits every single operation over its threads, which wait for each other after it and then read what other cores
wrote. A thread that does all steps of its own part finds the numbers in its own cache and waits once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Results of the function for each part, in their order; without gradients.

    There should be as many parts as `torch.get_num_threads`. One part alone has all of torch's threads for its
    operations.
    """
    if len(parts) < 2:
        return [torch.no_grad()(function)(part) for part in parts]
    return list(_pool(torch.get_num_threads()).map(torch.no_grad()(function), parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """That many threads, kept until the program ends."""
    ready = Barrier(threads)

    def take_one_core(_: int) -> None:
        torch.get_num_threads()  # takes over the program's number, which would otherwise happen later
        torch.set_num_threads(1)
        ready.wait()  # so that every thread is here once

    pool = ThreadPoolExecutor(threads, thread_name_prefix="one-core")
    list(pool.map(take_one_core, range(threads)))
    torch.set_num_threads(threads)  # what threads that begin later take over
    return pool
