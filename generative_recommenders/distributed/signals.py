"""SIGTERM and Ctrl-C: as a request that a training run sees between two steps, or as an interrupt of anything else."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130
"""Exit code of a run that stopped in good order because it was asked to."""
GRACE_SECONDS = 4.0
"""Seconds that a library's call, which no signal interrupts, may delay the end of a program."""
AGAIN_SECONDS = 0.5
"""After which an interrupt that did not arrive is raised again."""


class StopRequested(KeyboardInterrupt):
    """All processes of a run have agreed to stop here; what was done before may be saved."""


class StopRequest(contextlib.ExitStack):
    """While the context is open, SIGTERM and SIGINT set ``requested`` instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt at once. With several processes ask
    ``collectives.any(stop.requested)``, so that all stop after the same step.
    """

    requested = False

    def __enter__(self) -> StopRequest:
        interrupts = 0

        def handle(number: int) -> None:
            nonlocal interrupts
            self.requested = True
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                raise KeyboardInterrupt

        self.enter_context(handled_signals(handle))
        return self


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], object], wakeup: int = -1) -> Iterator[None]:
    """Calls ``handle(signal number)`` on SIGTERM and SIGINT; restores the handlers before it at the end.

    wakeup: file descriptor to which Python writes the number of a signal at once, whatever the main thread is in; none,
    unless given, so that an outer `interrupts` does not hear of what is handled here. Python lets the main thread alone
    set handlers; in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup_before = signal.set_wakeup_fd(wakeup)
    previous = {number: signal.signal(number, lambda caught, _: handle(caught)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)


@contextlib.contextmanager
def interrupts(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """While the context is open, SIGTERM raises KeyboardInterrupt as Ctrl-C does, and each ends the process in time.

    For work that leaves nothing half done when it ends anywhere. Python raises only when the library's call that the
    main thread is in returns; where that takes longer than grace_seconds, the process ends with exit code
    `INTERRUPTED`. A library may keep the exception to itself, as imports that try something do, and Python drops one
    from a finalizer: it is raised again until it arrives, at the end at last, and an error in its place is taken for
    it. A `StopRequest` that is opened within takes the signals over.
    """
    raised, end = threading.Event(), b"\0"

    def interrupt(number: int) -> None:
        raised.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while True:
            if not select.select([reader], [], [], AGAIN_SECONDS if raised.is_set() else None)[0]:
                if not _interrupt_is_handled():
                    os.kill(os.getpid(), signal.SIGTERM)  # no SIGINT, of which a `StopRequest` counts two as one more
                continue
            received = os.read(reader, 1)
            if received in (b"", end):
                return
            if received[0] in STOP_SIGNALS and not raised.wait(grace_seconds):
                os.write(2, b"error: interrupted\n")
                os._exit(INTERRUPTED)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with handled_signals(interrupt, writer):
            try:
                yield
            finally:  # while there are handlers for what the watcher sends
                os.write(writer, end)
                watcher.join()
        if raised.is_set():  # and kept until the end
            raise KeyboardInterrupt
    except Exception as error:
        if raised.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        os.close(writer)
        watcher.join()
        os.close(reader)


def _interrupt_is_handled() -> bool:
    """Whether the main thread is in a ``finally`` or an ``except`` that an interrupt has led to.

    A generator that ends because its loop was left sees GeneratorExit in the place of what ended the loop.
    """
    active: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = active[1] if isinstance(active, tuple) else active  # a triple in Python 3.11
    while error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error is not None
