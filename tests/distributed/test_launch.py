"""Launcher of processes: errors, exit codes, ports, signals, and lost peers."""

import contextlib
import ipaddress
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from absl import logging

from generative_recommenders.distributed import launch as launching
from generative_recommenders.distributed.process_group import join_group, process_collectives
from generative_recommenders.distributed.signals import INTERRUPTED, StopRequest
from generative_recommenders.errors import UserError
from launching import launch_quickly, on_cpu, report, reported, return_code, wait_for_ever
from programs import ROOT, quick_start


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """`test_spawn` spawns members as users do. Those that wait for ever are ended soon after another one failed."""
    launch_quickly(monkeypatch)
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.2)


@pytest.mark.parametrize(("method", "count"), [("spawn", 2), ("forkserver", 2), ("forkserver", 4)])
def test_spawn(tmp_path, monkeypatch, method, count):
    monkeypatch.setattr(launching, "START_METHOD", method)
    assert on_cpu(report, str(tmp_path), num_processes=count) == 0
    found = reported(tmp_path)
    total = str(count * (count + 1) / 2)
    assert [each[:3] for each in found] == [[str(count), total, str(rank)] for rank in range(count)]
    assert len({str(os.getpid()), *(each[3] for each in found)}) == count + 1


@pytest.mark.parametrize(("given", "threads"), [({}, "2"), ({"OMP_NUM_THREADS": "3"}, "7")])
def test_processes_share_the_cores(tmp_path, given, threads):
    member = quick_start().Process(target=report_threads, args=(str(tmp_path / "store"), given))
    member.start()
    member.join()
    assert (tmp_path / "store.threads").read_text() == threads


def report_threads(store: str, given: dict) -> None:
    """One of four processes on nine cores; the thread count was 7 before it joined."""
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(given)
    os.sched_getaffinity = lambda _: set(range(9))
    torch.set_num_threads(7)
    join_group(0, 1, 4, "cpu", timedelta(seconds=30), dist.FileStore(store, 1))
    Path(f"{store}.threads").write_text(str(torch.get_num_threads()))
    dist.destroy_process_group()


def own_pid(rank: int, world_size: int, folder: str) -> int:
    assert not dist.is_initialized()
    (Path(folder) / "pid").write_text(f"{os.getpid()} {rank} {world_size}")
    return 5


@pytest.mark.parametrize("count", [1, None])
def test_one_process_is_this_one(tmp_path, count):
    assert on_cpu(own_pid, str(tmp_path), num_processes=count) == 5
    assert (tmp_path / "pid").read_text() == f"{os.getpid()} 0 1"


def user_error(rank: int, world_size: int, failing: int) -> int:
    if rank == failing:
        raise UserError(f"item 7 of rank {rank} is unknown: check it")
    return wait_for_ever(rank)


@pytest.mark.parametrize(("count", "failing"), [(1, 0), (2, 1)])
def test_a_user_error_is_printed_as_one_line(capfd, count, failing):
    assert on_cpu(user_error, failing, num_processes=count) == 2
    assert capfd.readouterr().err == f"error: item 7 of rank {failing} is unknown: check it\n"


@pytest.mark.parametrize("count", [0, 1025])
def test_a_number_of_processes_that_cannot_be_meant_is_one_line(capfd, count):
    assert on_cpu(return_code, num_processes=count) == 2
    assert capfd.readouterr().err == f"error: num_processes is {count}; it must be from 1 to 1024\n"


def fault(rank: int, world_size: int, how: str) -> int:
    process_collectives("cpu").barrier()
    if rank == 1:
        time.sleep(0.1)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the fault of this rank")
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return wait_for_ever()
    process_collectives("cpu").barrier()  # ends by the loss of the peer
    return 0


@pytest.mark.parametrize("how", ["raised", "deaf"])
def test_the_first_failure_ends_all_with_its_own_traceback(capfd, how):
    assert on_cpu(fault, how) == 1
    text = capfd.readouterr().err
    assert text.startswith("rank 1 failed") and "ValueError: the fault of this rank" in text
    assert text.count("Traceback (most recent call last)") == 1
    assert multiprocessing.active_children() == []


def test_a_killed_member_ends_all(capfd):
    assert on_cpu(fault, "killed") == 1
    assert "rank 1 failed, the other processes are ended: it was killed by SIGKILL" in capfd.readouterr().err
    assert multiprocessing.active_children() == []


def test_one_process_raises_its_error():
    with pytest.raises(ZeroDivisionError):
        on_cpu(divide, 0, num_processes=1)


def divide(rank: int, world_size: int, by: int) -> int:
    return 1 // by


def hang(rank: int, world_size: int) -> int:
    if rank == 1:
        return wait_for_ever()
    process_collectives("cpu").barrier()
    return 0


def test_a_peer_that_does_not_answer_is_noticed(capfd):
    assert on_cpu(hang, timeout=timedelta(seconds=2)) == 1
    text = capfd.readouterr().err
    assert text.startswith("rank 0 failed") and re.search("(?i)timed out|timeout", text)


def test_own_exit_code():
    assert on_cpu(return_code) == 3


def test_a_busy_port_is_replaced_and_reported(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert on_cpu(report, str(tmp_path), port=port) == 0
    assert len(reported(tmp_path)) == 2
    assert len(lines) == 1 and f"port {port} is in use" in lines[0]


def listening_addresses(pid: int) -> set[str]:
    """Local addresses of the sockets on which a process listens, from the kernel's tables."""
    owned = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            owned.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                words = bytes.fromhex(fields[1].split(":")[0])
                swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(str(ipaddress.ip_address(swapped)))
    return found


def listen(rank: int, world_size: int, folder: str, parent: int) -> int:
    group = process_collectives("cpu")
    group.barrier()
    found = listening_addresses(os.getpid()) | listening_addresses(parent)
    (Path(folder) / str(rank)).write_text(" ".join(sorted(found)))
    group.barrier()
    return 0


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_ports_are_bound_to_loopback(tmp_path):
    assert on_cpu(listen, str(tmp_path), os.getpid()) == 0
    for found in reported(tmp_path):
        assert "127.0.0.1" in found
        assert all(re.fullmatch(r"127\.0\.0\.1|::1|::ffff:127\.0\.0\.1|::ffff:7f00:1", each) for each in found)


def until_stopped(rank: int, world_size: int, folder: str) -> int:
    with StopRequest() as stop:
        process_collectives("cpu").barrier()
        (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
        while not stop.requested:
            time.sleep(0.01)
        (Path(folder) / f"checkpoint{rank}").write_text("")
        time.sleep(1)  # a killed launcher's threads end one by one, and each may signal
    return 0


def as_user(folder: str) -> None:
    launching.START_METHOD = "fork"  # this process is a fresh one, and small
    for _ in range(20):  # as a library's: any that outlives the main thread may tell the members of its end
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    sys.exit(on_cpu(until_stopped, folder))


def started(folder: Path) -> tuple[multiprocessing.Process, list[int]]:
    """A process that launched two members, and their ids."""
    launcher = quick_start().Process(target=as_user, args=(str(folder),))
    launcher.start()
    wait_until(lambda: all((folder / f"pid{rank}").exists() for rank in range(2)))
    time.sleep(0.1)
    return launcher, [int((folder / f"pid{rank}").read_text()) for rank in range(2)]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_members_who_finish_cleanly(tmp_path, number):
    launcher, _ = started(tmp_path)
    os.kill(launcher.pid, number)
    launcher.join(60)
    assert launcher.exitcode == 0
    assert len(list(tmp_path.glob("checkpoint*"))) == 2


SPAWNED = """
import time
{before}
from generative_recommenders.distributed.launch import launch
from tqdm import tqdm

def work(rank, world_size):
    list(tqdm([1], file=open("bar", "w")))
    open(f"there{{rank}}", "w").close()
    time.sleep(60)
    return 0

if __name__ == "__main__":
    raise SystemExit(launch(work, (), 2, 0, device_type="cpu"))
"""


@pytest.mark.parametrize("before", ["", "if __name__ != '__main__': open('there1', 'w').close(); time.sleep(60)"])
def test_an_interrupt_of_members_that_save_nothing_is_one_line(tmp_path, before):
    """Of those that work, and of those that still import."""
    (tmp_path / "program.py").write_text(SPAWNED.format(before=before))
    command = [sys.executable, "program.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "there1").exists)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == INTERRUPTED
    assert errors == ["error: interrupted"]


def test_members_stop_when_the_launcher_is_killed(tmp_path):
    launcher, members = started(tmp_path)
    launcher.kill()
    launcher.join()
    wait_until(lambda: not any(is_running(pid) for pid in members))
    assert len(list(tmp_path.glob("checkpoint*"))) == 2


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
