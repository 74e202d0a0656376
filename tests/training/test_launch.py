import contextlib
import ipaddress
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from absl import logging

from generative_recommenders.features import UserError
from generative_recommenders.training import failure_watch, spawned
from generative_recommenders.training.distributed import join_group, process_collectives
from generative_recommenders.training.launch import first_host, given_rendezvous, launch
from generative_recommenders.training.signals import StopRequest
from programs import quick_start

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Members are forked from a server that has the imports done; `test_spawn` spawns them as users do."""
    quick_start()
    monkeypatch.setattr(spawned, "START_METHOD", "forkserver")
    for name in [*LAUNCH_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


def on_cpu(worker, *args, num_processes=2, **options) -> int:
    return launch(worker, args, num_processes, options.pop("port", 0), device_type="cpu", **options)


def report(rank: int, world_size: int, folder: str) -> int:
    group = process_collectives("cpu")
    total = group.sum_scalar(rank + 1)
    values = (world_size, total, os.environ["LOCAL_RANK"], os.getpid())
    (Path(folder) / str(rank)).write_text(" ".join(map(str, values)))
    return 0


def reported(folder: Path) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(("method", "count"), [("spawn", 2), ("forkserver", 2), ("forkserver", 4)])
def test_spawn(tmp_path, monkeypatch, method, count):
    monkeypatch.setattr(spawned, "START_METHOD", method)
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


def wait_for_ever(*_) -> int:
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize(("count", "failing"), [(1, 0), (2, 1)])
def test_a_user_error_is_one_line(capfd, count, failing):
    assert on_cpu(user_error, failing, num_processes=count) == 2
    assert capfd.readouterr().err == f"error: item 7 of rank {failing} is unknown: check it\n"


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
def test_the_first_failure_ends_all_with_its_own_traceback(capfd, monkeypatch, how):
    monkeypatch.setattr(spawned, "END_SECONDS", 0.2)
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


def return_code(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    return 3 * rank


def test_a_busy_port_is_replaced_and_said(tmp_path, monkeypatch):
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
        assert all(
            re.fullmatch(r"127\.0\.0\.1|::1|::ffff:127\.0\.0\.1|::ffff:7f00:1", each) for each in found
        )


def until_stopped(rank: int, world_size: int, folder: str) -> int:
    with StopRequest() as stop:
        process_collectives("cpu").barrier()
        (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
        while not stop.requested:
            time.sleep(0.01)
    (Path(folder) / f"checkpoint{rank}").write_text("")
    return 0


def as_user(folder: str) -> None:
    spawned.START_METHOD = "fork"  # this process is a fresh one, and small
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


def started_by_slurm(worker, rank: int, port: int, *args) -> None:
    os.environ.update(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    failure_watch.POLL_SECONDS, failure_watch.GRACE_SECONDS = 0.3, 0.1
    sys.exit(on_cpu(worker, *args, num_processes=None))


def exit_codes_under_slurm(worker, *args) -> list[int | None]:
    port = free_port()
    tasks = [
        quick_start().Process(target=started_by_slurm, args=(worker, rank, port, *args)) for rank in (0, 1)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    return [task.exitcode for task in tasks]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_count_beside_a_rendezvous_is_not_used_and_that_is_said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert on_cpu(return_code, num_processes=4) == 0
    assert lines == ["num_processes = 4 is not used: 1 processes were started already"]


def test_joins_under_slurm_variables(tmp_path):
    assert exit_codes_under_slurm(report, str(tmp_path)) == [0, 0]
    assert [each[:3] for each in reported(tmp_path)] == [["2", "3.0", "0"]] * 2


def fail_while_the_other_hears_nothing(rank: int, world_size: int, failing: int, how: str) -> int:
    process_collectives("cpu").barrier()
    if rank != failing:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return wait_for_ever()
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the fault of this rank")


@pytest.mark.parametrize(
    ("failing", "how", "codes"),
    [
        (0, "raised", [1, 1]),
        (1, "raised", [1, 1]),
        (0, "killed", [-signal.SIGKILL, 1]),
        (1, "killed", [1, -signal.SIGKILL]),
    ],
)
def test_a_failure_ends_the_peers_that_something_else_started(failing, how, codes):
    assert exit_codes_under_slurm(fail_while_the_other_hears_nothing, failing, how) == codes


def finish_late(rank: int, world_size: int) -> int:
    time.sleep(rank)
    return 0


def test_a_process_that_is_done_waits_for_the_others():
    assert exit_codes_under_slurm(finish_late) == [0, 0]


PROGRAM = str(Path(__file__).with_name("torchrun_program.py"))


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}


def torchrun(folder: Path, failing: int, *more: str, count: int = 2) -> subprocess.CompletedProcess:
    options = [
        f"--nproc_per_node={count}",
        f"--master_port={free_port()}",
        *more,
        PROGRAM,
        str(folder),
        str(failing),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("count", "total"), [(2, "3.0"), (4, "10.0")])
def test_torchrun(tmp_path, count, total):
    finished = torchrun(tmp_path, failing=-1, count=count)
    assert finished.returncode == 0, finished.stderr
    assert reported(tmp_path) == [[total]] * count


def test_torchrun_starts_a_failed_run_again(tmp_path):
    """The store that says which rank failed is torchrun's, and outlives the failure."""
    finished = torchrun(tmp_path, 1, "--max_restarts=1", "--monitor_interval=0.1")
    assert finished.returncode == 0, finished.stderr
    assert reported(tmp_path) == [["3.0"], ["3.0"]]


@pytest.mark.slow
def test_torchrun_failure(tmp_path):
    finished = torchrun(tmp_path, failing=1)
    assert finished.returncode == 1
    assert finished.stderr.count("ValueError: the fault of this rank") == 1


@pytest.fixture
def two_hosts():
    """Names of two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2."""
    names = [f"host{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
    for number, name in enumerate(names, start=1):
        commands.append(f"ip -n {name} addr add 10.77.0.{number}/24 dev cable")
        commands += [f"ip -n {name} link set {device} up" for device in ("cable", "lo")]
    try:
        if not shutil.which("ip") or not all(map(succeeds, commands)):
            pytest.skip("network namespaces are not permitted")
        yield names
    finally:
        for name in names:
            if shutil.which("ip"):
                succeeds(f"ip netns del {name}")


def succeeds(command: str) -> bool:
    return subprocess.run(command.split(), capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_two_hosts(tmp_path, two_hosts):
    hosts = []
    for rank, name in enumerate(two_hosts):
        variables = environment(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="10.77.0.1", MASTER_PORT="29400",
            GLOO_SOCKET_IFNAME="cable",
        )  # fmt: skip
        command = ["ip", "netns", "exec", name, sys.executable, PROGRAM, str(tmp_path), "-1"]
        hosts.append(subprocess.Popen(command, env=variables))
    assert [host.wait(120) for host in hosts] == [0, 0]
    assert reported(tmp_path) == [["3.0"], ["3.0"]]


def test_the_given_rendezvous():
    assert given_rendezvous({}) is None
    assert given_rendezvous({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[03-05]"}
    assert given_rendezvous(batch_script) is None
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    found = given_rendezvous({**given, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 1)
    assert (found.rank, found.world_size, found.local_rank, found.address, found.port) == (3, 4, 1, "a", 7)
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "gpu[03-05]",
    }
    found = given_rendezvous(slurm)
    assert (found.rank, found.local_rank, found.address, found.port) == (1, 0, "gpu03", 29500)
    slurm |= {"SLURM_STEP_NODELIST": "gpu[04-05]", "SLURM_JOB_ID": "7654321", "SLURM_STEP_ID": "3"}
    found = given_rendezvous(slurm)
    assert (found.address, found.port) == ("gpu04", 10_000 + (8 * 7654321 + 3) % 20_000)
    assert given_rendezvous(slurm, 7).port == 7


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "two"}, "RANK='two'"),
        ({"RANK": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_a_rendezvous_that_makes_no_sense(changed, said):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    with pytest.raises(UserError, match=re.escape(said)):
        given_rendezvous({**given, **changed}, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3],m", "n1"), ("n[07,9]", "n07"), ("n[1-2]-ib", "n1-ib"), ("", "")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_the_others_cannot_be_met(monkeypatch, capfd):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert on_cpu(report, "", timeout=timedelta(seconds=1)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: rank 1: cannot meet the other 1 processes at")


@pytest.mark.parametrize(("count", "said"), [(0, "must be 1 or more"), (3, "at most one process a GPU")])
def test_a_count_that_cannot_be(monkeypatch, capfd, count, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch(report, ("",), count, device_type="cuda") == 2
    assert said in capfd.readouterr().err
