"""Heartbeat between processes that no launcher watches, such as SLURM's tasks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from absl import logging

POLL_SECONDS = 1.0
CONNECT_SECONDS = 0.01
"""Between looks of rank 0, which serves the store, whether all have connected to it."""
STALE_POLLS = 10
"""After how many of its own polls without a heartbeat a process takes a peer for lost. Polls, not seconds: one that was
held up itself blames nobody."""
GRACE_SECONDS = 5.0
"""Time for a process to end by itself after it lost the store: rank 0 may have failed, or the run may be over."""


@contextlib.contextmanager
def heartbeat(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> Iterator[dist.Store]:
    """While the context is open, a peer that stops ends this process within 20 seconds. Yields a store of the run.

    A thread counts up this rank's number in the store at ``address:port``, where the group has met, and watches
    those of all others. Without it, a process would wait for a lost peer until the group's timeout.
    """
    store = dist.PrefixStore("heartbeat", dist.TCPStore(address, port, None, is_master=False, timeout=timeout))
    closed = threading.Event()
    threading.Thread(target=_watch, args=(rank, world_size, store, closed), daemon=True).start()
    try:
        store.set(f"here {rank}", "")
        # Were rank 0 to fail before all have connected, the others would try to until the group's timeout.
        while rank == 0 and not store.check([f"here {peer}" for peer in range(world_size)]):
            time.sleep(CONNECT_SECONDS)
        yield store
    finally:
        closed.set()


def _watch(rank: int, world_size: int, store: dist.Store, closed: threading.Event) -> None:
    counts, unchanged = [0] * world_size, [0] * world_size
    while not closed.wait(POLL_SECONDS):
        try:
            store.add(str(rank), 1)
            now = [store.add(str(peer), 0) for peer in range(world_size)]
        except dist.DistError:  # at the end of a good run, too, where rank 0 leaves first
            if not closed.wait(GRACE_SECONDS):
                _end(rank, "rank 0, which serves the store, is gone")
            return
        unchanged = [n + 1 if old == new else 0 for n, old, new in zip(unchanged, counts, now)]
        counts = now
        if max(unchanged) >= STALE_POLLS and not closed.is_set():
            lost = unchanged.index(max(unchanged))
            _end(rank, f"rank {lost} gave no heartbeat for {STALE_POLLS * POLL_SECONDS:g} s")


def _end(rank: int, reason: str) -> None:
    logging.error("rank %d: ended, %s", rank, reason)  # on the screen, and in the log of an open run
    logging.flush()
    os._exit(1)
