"""Clock, memory and arguments of the workers that `compare_peers.py` starts, one process each; standard library
alone."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="of the data, in each system's own form")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--started", type=float, required=True, help="time.time() when the process was started")
    for name, value in (("batch", 128), ("length", 200), ("width", 64), ("blocks", 2), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


class Clock:
    """Times of a worker: the first step, the steps after it, an epoch, an evaluation."""

    def __init__(self, started: float) -> None:
        self.started, self.first = started, None
        self.steps: list[float] = []
        self.epoch = 0.0
        self.begin_epoch()

    def step(self) -> None:
        """Called at the end of each training step."""
        now = time.perf_counter()
        if self.first is None:
            self.first = time.time() - self.started
        else:
            self.steps.append(now - self._last)
        self._last = now

    def begin_epoch(self) -> None:
        """What lies between two epochs is no step."""
        self._begun = self._last = time.perf_counter()

    def end_epoch(self) -> None:
        self.epoch = time.perf_counter() - self._begun

    def report(self, **figures: object) -> None:
        """Prints the last epoch's figures, and these, as the last line; seconds but for memory."""
        settled = self.steps[2:] or self.steps
        figures = {"epoch": self.epoch, "steps": len(self.steps) + 1, **figures}
        record = {
            "first_step": round(self.first or 0.0, 2),
            "step": round(statistics.median(settled), 4),
            "peak_rss_mb": peak_rss_mb(),
            **{name: round(x, 3) if isinstance(x, float) else x for name, x in figures.items()},
        }
        print(json.dumps(record))


def peak_rss_mb() -> int:
    """Of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
