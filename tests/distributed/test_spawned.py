import os
import signal
import time
from multiprocessing import popen_forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from generative_recommenders.distributed import spawned
from generative_recommenders.distributed.launch import launch
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.distributed.signals import StopRequest
from generative_recommenders.errors import UserError
from programs import quick_start

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_start()
    monkeypatch.setattr(spawned, "START_METHOD", "forkserver")
    monkeypatch.setattr(spawned, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(spawned, "END_SECONDS", 0.3)
    for name in [*LAUNCH_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


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


def on_cpu(worker, *args) -> int:
    return launch(worker, args, 2, 0, device_type="cpu")


def wait_for_ever() -> int:
    while True:
        time.sleep(0.05)


@pytest.fixture
def late_exit_codes(monkeypatch):
    """The first look behind the end of a process finds no exit code: its sentinel is closed, and the kernel
    is not yet done with it."""
    poll, seen = popen_forkserver.Popen.poll, set()

    def late(self, flag=os.WNOHANG):
        early = flag == os.WNOHANG and self.returncode is None and self.pid not in seen
        if early and wait([self.sentinel], 0):
            seen.add(self.pid)
            return None
        return poll(self, flag)

    monkeypatch.setattr(popen_forkserver.Popen, "poll", late)


def return_code(rank: int, world_size: int, code: int) -> int:
    process_collectives("cpu").barrier()
    return code * rank


@pytest.mark.parametrize("code", [3, 130])
def test_an_exit_code_that_comes_late_is_not_lost(late_exit_codes, code):
    assert on_cpu(return_code, code) == code


def fail_one_by_one(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    if rank == 1:
        raise ValueError("the fault of rank 1")
    time.sleep(0.2)
    raise RuntimeError("lost a peer")


def test_the_first_failure_is_named_though_its_exit_code_comes_late(late_exit_codes, capfd):
    assert on_cpu(fail_one_by_one) == 1
    text = capfd.readouterr().err
    assert text.startswith("rank 1 failed") and text.endswith("ValueError: the fault of rank 1\n\n")


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
    time.sleep(1)
    return 0


def test_a_signal_while_the_members_are_started_is_passed_on(monkeypatch):
    start = spawned._start

    def interrupted_start(plan, rank):
        member = start(plan, rank)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return member

    monkeypatch.setattr(spawned, "_start", interrupted_start)
    assert on_cpu(idle) == 128 + signal.SIGTERM


class Recorder:
    """A process that notes the signals it gets."""

    pid = 0

    def __init__(self):
        self.got: list[int] = []

    def is_alive(self) -> bool:
        return True


def test_each_signal_is_passed_on_once(monkeypatch):
    relay, processes = spawned.SignalRelay(), [Recorder(), Recorder()]
    members = [spawned.Member(rank, process, None) for rank, process in enumerate(processes)]

    def send(process, number):
        process.got.append(number)
        if number == signal.SIGTERM and len(relay.received) < 3:
            relay.handle(signal.SIGINT)  # comes while another one is passed on

    monkeypatch.setattr(spawned, "_send", send)
    relay.handle(signal.SIGTERM)
    assert [process.got for process in processes] == [[], []]
    relay.open(members)
    assert [sorted(process.got) for process in processes] == [
        [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    ] * 2
    assert len(relay.received) == 3


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
                raise OSError("the disk is full")
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
    assert text.startswith("rank 0 failed") and "OSError: the disk is full" in text


def stop_unasked(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    return 130 if rank == 1 else wait_for_ever()


def test_a_member_that_stops_unasked_ends_all():
    assert on_cpu(stop_unasked) == 130
