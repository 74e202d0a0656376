"""SIGTERM and Ctrl-C: as a request that a training run sees between two steps, or as an interrupt of anything else."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130
"""Exit code of a run that stopped in good order because it was asked to."""
GRACE_SECONDS = 4.0
"""Seconds that a library's call, which no signal interrupts, may delay the end of a program."""


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
    `INTERRUPTED`. A `StopRequest` that is opened within takes the signals over.
    """
    raised = threading.Event()

    def interrupt(number: int) -> None:
        raised.set()
        raise KeyboardInterrupt

    def exit_after_grace() -> None:
        while received := os.read(reader, 1):  # nothing more once the writer is closed
            if received[0] in STOP_SIGNALS and not raised.wait(grace_seconds):
                os.write(2, b"error: interrupted\n")
                os._exit(INTERRUPTED)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=exit_after_grace, daemon=True)
    watcher.start()
    try:
        with handled_signals(interrupt, writer):
            yield
    finally:
        os.close(writer)
        watcher.join()
        os.close(reader)
