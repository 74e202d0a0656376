"""SIGTERM and Ctrl-C as a request that the training loop sees between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130
"""Exit code of a run that stopped in good order because it was asked to."""


class StopRequest:
    """While the context is open, SIGTERM and SIGINT set ``requested`` instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt at once. With several processes ask
    ``collectives.any(stop.requested)``, so that all stop behind the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._context = handled_signals(self._handle)

    def __enter__(self) -> StopRequest:
        self._context.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)

    def _handle(self, number: int) -> None:
        self.requested = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], object]) -> Iterator[None]:
    """Calls ``handle(signal number)`` on SIGTERM and SIGINT; restores the handlers before it at the end.

    Python lets the main thread alone set handlers; in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda caught, _: handle(caught)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
