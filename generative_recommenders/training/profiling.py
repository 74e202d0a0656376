"""Trace of a few training steps by torch's profiler, for ``--profile``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from absl import logging

WAIT, WARMUP, ACTIVE = 3, 2, 5


@contextlib.contextmanager
def step_profiler(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step; with a folder, steps 6 to 10 go to ``profile.json`` (a Chrome trace) in it."""
    if folder is None:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder / "profile.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        logging.info("profile of %d steps in %s\n%s", ACTIVE, folder / "profile.json", table)

    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        profiler.step()

    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield on_step
    if steps < WAIT + WARMUP + ACTIVE:
        logging.warning("--profile: no trace of %d steps, it needs %d", steps, WAIT + WARMUP + ACTIVE)
