"""Heartbeat between processes that no launcher watches, such as SLURM's tasks."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from absl import logging

POLL_SECONDS = 1.0
STALE_POLLS = 10
"""After how many of its own polls without a heartbeat a process takes a peer for lost. Polls, not seconds: one that was
held up itself blames nobody."""
GRACE_SECONDS = 5.0
"""Time for a process to end by itself after it lost the store: rank 0 may have failed, or the run may be over."""


class Heartbeat:
    """While the context is open, a peer that stops ends this process within 20 seconds.

    A thread counts up this rank's number in the store at ``address:port``, where the group has met, and watches
    those of all others. Without it, a process would wait for a lost peer until the group's timeout.
    """

    def __init__(self, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        store = dist.TCPStore(address, port, None, is_master=False, timeout=timeout)
        self.store = dist.PrefixStore("heartbeat", store)
        self.closed = threading.Event()

    def __enter__(self) -> Heartbeat:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()

    def _watch(self) -> None:
        counts, unchanged = [0] * self.world_size, [0] * self.world_size
        while not self.closed.wait(POLL_SECONDS):
            try:
                self.store.add(str(self.rank), 1)
                now = [self.store.add(str(rank), 0) for rank in range(self.world_size)]
            except dist.DistError:  # at the end of a good run, too, where rank 0 leaves first
                if not self.closed.wait(GRACE_SECONDS):
                    self._end("rank 0, which serves the store, is gone")
                return
            unchanged = [n + 1 if old == new else 0 for n, old, new in zip(unchanged, counts, now)]
            counts = now
            if max(unchanged) >= STALE_POLLS and not self.closed.is_set():
                lost = unchanged.index(max(unchanged))
                self._end(f"rank {lost} gave no heartbeat for {STALE_POLLS * POLL_SECONDS:g} s")

    def _end(self, reason: str) -> None:
        logging.error("rank %d: ended, %s", self.rank, reason)  # on the screen, and in the log of an open run
        logging.flush()
        os._exit(1)
