"""How a process that something else started learns that another one of its run failed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""What a process has, after a peer failed, to fail by itself or to be ended by its launcher."""
_FAILED = "failed_ranks"


class FailureWatch:
    """While the context is open, the failure of any process of the run ends this one within seconds.

    A process that leaves the context by an exception says so in the store at ``address:port``, at which the
    group has met; a thread of the others looks there. A store that is gone counts as a failure too. Without
    it, a process that waits for a lost peer on a GPU would wait for the group's timeout.
    """

    def __init__(self, rank: int, address: str, port: int, timeout: timedelta) -> None:
        self._rank = rank
        self._connect = lambda: dist.TCPStore(address, port, None, False, timeout=timeout)
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
        while not self._closed.wait(POLL_SECONDS):
            if _is_failed(store) and not self._closed.wait(GRACE_SECONDS):
                print(
                    f"rank {self._rank}: ended, another process of the run failed",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def _is_failed(store: dist.Store) -> bool:
    try:
        return store.check([_FAILED])
    except dist.DistError:
        return True
