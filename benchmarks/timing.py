"""Times of repeated calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def by_turns(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each repeat of each call, by name. Calls take turns, so that a busy moment of the machine meets all;
    the rounds of the warm-up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():  # a GPU that the calls do not use is left alone
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: each[warmup:] for name, each in seconds.items()}


def seconds_of(call: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each repeat of one call."""
    return by_turns({"": call}, repeats, warmup)[""]
