"""SIGTERM and Ctrl-C: a request within `StopRequest`, an interrupt within `interrupts`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest, interrupts
from programs import quick_start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_a_scheduler_may_repeat_itself():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_handlers_are_restored_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ValueError), StopRequest():
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_threads_have_no_signals_to_handle():
    seen = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_interrupt_what_keeps_no_state(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupts():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before


def test_an_interrupt_that_a_library_keeps_to_itself_is_raised_again():
    with pytest.raises(KeyboardInterrupt), interrupts():
        with contextlib.suppress(BaseException):  # as an import that may fail does
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("it went on")


def test_an_interrupt_that_is_kept_until_the_end_is_raised_there():
    """As where the last import of a program keeps it: what follows must not begin."""
    with pytest.raises(KeyboardInterrupt), interrupts(), contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_generator_that_ends_on_an_interrupt_may_take_its_time():
    ended = []

    def batches():
        try:
            yield 1
        finally:
            time.sleep(1.5)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt), interrupts():
        for _ in batches():
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended


def test_an_error_in_the_place_of_an_interrupt_is_taken_for_it():
    lock = threading.Lock()
    with pytest.raises(KeyboardInterrupt), interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            lock.release()  # RuntimeError: it was not yet acquired
    with pytest.raises(RuntimeError), interrupts():
        lock.release()


def test_what_ends_on_an_interrupt_may_take_its_time():
    ended = False
    with pytest.raises(KeyboardInterrupt), interrupts(grace_seconds=0.1):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with contextlib.suppress(ValueError):
                int("no number")
            time.sleep(1.5)
            ended = True
    assert ended


def test_a_request_within_takes_the_signals_over():
    with interrupts(grace_seconds=0.05):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # nor does it interrupt afterwards what it was handled by
        assert stop.requested


def held_up(folder: str) -> None:
    """In a library's call that no signal interrupts: a lock's wait, without Python's."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    with interrupts(grace_seconds=0.5):
        (Path(folder) / "ready").touch()
        libc.pthread_mutex_lock(mutex)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_library_holds_up_ends_in_time(tmp_path, number):
    process = quick_start().Process(target=held_up, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == INTERRUPTED
