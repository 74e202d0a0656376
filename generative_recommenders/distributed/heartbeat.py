"""How a process that something else started learns that another one of its run failed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

POLL_SECONDS = 1.0
STALE_POLLS = 10
"""After how many of its own polls without a sign of life a process takes its neighbour for lost. Polls, not
seconds: one that was held up itself blames nobody."""
GRACE_SECONDS = 5.0
"""What a process has, after a peer failed, to fail by itself or to be ended by its launcher."""
_FAILED = "failed_ranks"


class FailureWatch:
    """While the context is open, the failure of any process of the run ends this one within 20 seconds.

    A process that leaves the context by an exception says so in the store at ``address:port``, at which the
    group has met; a thread of the others looks there. The thread also counts up a sign of life in the store
    and watches that of the next rank, for one that was killed says nothing. A store that is gone counts as a
    failure too. Without all this, a process would wait for a lost peer until the group's timeout.
    """

    def __init__(self, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> None:
        self._rank, self._next = rank, (rank + 1) % world_size
        self._connect = lambda: dist.PrefixStore(
            f"failure_watch/{attempt(os.environ)}", dist.TCPStore(address, port, None, False, timeout=timeout)
        )
        self._store = self._connect()
        self._closed = threading.Event()

    def __enter__(self) -> FailureWatch:
        threading.Thread(target=self._watch, args=(self._connect(),), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if kind is not None:
            with contextlib.suppress(dist.DistError):
                self._store.add(_FAILED, 1)

    def _watch(self, store: dist.Store) -> None:
        signs = _SignsOfLife(store, self._rank, self._next)
        while not self._closed.wait(POLL_SECONDS):
            if _is_failed(store, signs) and not self._closed.wait(GRACE_SECONDS):
                self._end("another process of the run failed")
            if signs.unchanged >= STALE_POLLS and not self._closed.is_set():
                with contextlib.suppress(dist.DistError):
                    store.add(_FAILED, 1)
                self._end(f"rank {self._next} gave no sign of life for {STALE_POLLS * POLL_SECONDS:g} s")

    def _end(self, reason: str) -> None:
        print(f"rank {self._rank}: ended, {reason}", file=sys.stderr, flush=True)
        os._exit(1)


class _SignsOfLife:
    """unchanged: how often in a row the next rank's count was the same."""

    def __init__(self, store: dist.Store, rank: int, next_rank: int) -> None:
        self._store, self._own, self._other = store, f"alive_{rank}", f"alive_{next_rank}"
        self._count = 0
        self.unchanged = 0

    def exchange(self) -> None:
        """Gives this process's sign and looks for the other's."""
        self._store.add(self._own, 1)
        count = self._store.add(self._other, 0)
        self.unchanged = self.unchanged + 1 if count == self._count else 0
        self._count = count


def attempt(environment: Mapping[str, str]) -> str:
    """Names this start of the run: torchrun's store outlives a failed one, and what it said then."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(environment.get(name, "") for name in names)


def _is_failed(store: dist.Store, signs: _SignsOfLife) -> bool:
    try:
        signs.exchange()
        return store.check([_FAILED])
    except dist.DistError:
        return True
