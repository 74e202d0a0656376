"""Failures and signals of processes that were spawned on this host."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from generative_recommenders.distributed import launch as launching
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest, handled_signals
from generative_recommenders.errors import UserError
from launching import fail_beside_a_log, launch_quickly, on_cpu, wait_for_ever


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    launch_quickly(monkeypatch)
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(launching, "SETTLE_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def no_hang():
    """A run that does not end is a failed test."""

    def give_up(*_):
        raise TimeoutError("the run does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fail_one_by_one(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    if rank == 1:
        raise ValueError("the fault of rank 1")
    time.sleep(0.2)
    raise RuntimeError("lost a peer")


def test_the_first_failure_is_named(capfd):
    assert on_cpu(fail_one_by_one) == 1
    text = capfd.readouterr().err
    assert text.startswith("rank 1 failed") and text.endswith("ValueError: the fault of rank 1\n\n")


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("input", 2, r"rank 1 failed: item 7 is unknown: check it"),
        ("raised", 1, r"rank 1 failed: Traceback[^$]*ValueError: the fault of this rank"),
        (
            "killed",
            1,
            r"rank 1 failed: it was killed by SIGKILL, which is often the system running out of memory",
        ),
    ],
)
def test_the_log_says_why_another_process_failed(tmp_path, how, code, said):
    log = tmp_path / "train.log"
    assert on_cpu(fail_beside_a_log, how, str(log)) == code
    assert re.fullmatch(rf"begun\n\S+ \S+ ERROR {said}\n", log.read_text())


def test_the_log_has_a_fault_of_all_processes_once(tmp_path):
    assert on_cpu(fail_beside_a_log, "both", str(tmp_path / "train.log")) == 2
    assert (tmp_path / "train.log").read_text() == "UserError: item 7 is unknown: check it\n"


def fail_at_length(rank: int, world_size: int, kind: type, character: str) -> int:
    if rank == 1:
        raise kind(f"from here {character * 200_000} to there")
    return wait_for_ever()


@pytest.mark.parametrize("character", ["a", "ж", "\0", "\udcff"])
@pytest.mark.parametrize(("kind", "code", "start"), [(UserError, 2, "error: "), (ValueError, 1, "rank 1 f")])
def test_a_failure_may_say_more_than_a_pipe_holds(capfd, character, kind, code, start):
    assert on_cpu(fail_at_length, kind, character) == code
    text = capfd.readouterr().err
    assert text.startswith(start) and text.endswith(" to there" + "\n" * (1 + (kind is ValueError)))
    assert len(text.encode()) < 32_000


def idle(rank: int, world_size: int) -> int:
    time.sleep(10)
    return 0


def test_a_signal_while_the_processes_are_started_is_relayed(monkeypatch):
    start = launching.start_processes

    def interrupted_start(*args, **options):
        context = start(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return context

    monkeypatch.setattr(launching, "start_processes", interrupted_start)
    assert on_cpu(idle) == INTERRUPTED


def count_signals(rank: int, world_size: int, parent: int, folder: str) -> int:
    received: list[int] = []
    with handled_signals(received.append):
        process_collectives("cpu").barrier()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            if rank == 0:
                os.kill(parent, number)
            time.sleep(0.7)
    (Path(folder) / str(rank)).write_text(" ".join(str(int(number)) for number in received))
    return 0


def test_each_signal_is_relayed_once(tmp_path):
    assert on_cpu(count_signals, os.getpid(), str(tmp_path)) == 0
    expected = f"{int(signal.SIGTERM)} {int(signal.SIGINT)} {int(signal.SIGINT)}"
    assert [path.read_text() for path in tmp_path.iterdir()] == [expected] * 2


def stop_on_request(rank: int, world_size: int, parent: int, folder: str, how: str) -> int:
    """Rank 1 is done at once; rank 0 writes for longer than a failure of rank 1 would leave it."""
    with StopRequest() as stop:
        process_collectives("cpu").barrier()
        if rank == 0:
            os.kill(parent, signal.SIGTERM)
        while not stop.requested:
            time.sleep(0.01)
        if rank == 0:
            time.sleep(0.9)
            if how == "fails":
                raise ValueError("the shapes differ")
            (Path(folder) / "checkpoint").write_text("whole")
    return 0 if how == "finishes" and rank == 0 else 130


@pytest.mark.parametrize("how", ["stops", "finishes"])
def test_members_that_stop_on_request_leave_the_others_their_time(tmp_path, capfd, how):
    assert on_cpu(stop_on_request, os.getpid(), str(tmp_path), how) == 130
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert capfd.readouterr().err == ""


def test_a_failure_after_the_request_is_one(tmp_path, capfd):
    assert on_cpu(stop_on_request, os.getpid(), str(tmp_path), "fails") == 1
    text = capfd.readouterr().err
    assert text.startswith("rank 0 failed") and "ValueError: the shapes differ" in text


def stop_unasked(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    return 130 if rank == 1 else wait_for_ever(rank)


def test_a_process_that_stops_alone_ends_all(capfd):
    """It waits for the others, which may be writing the checkpoint, until the timeout."""
    assert on_cpu(stop_unasked, timeout=timedelta(seconds=2)) == 1
    assert capfd.readouterr().err.startswith("rank 1 failed")
