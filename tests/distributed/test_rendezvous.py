"""Processes started by others than main.py: SLURM, torchrun, hosts that meet at an address."""

import os
import re
import shutil
import signal
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

from generative_recommenders.distributed import heartbeat
from generative_recommenders.distributed.launch import launch
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.distributed.rendezvous import first_host, given_rendezvous
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import add_log_file, set_up_logging
from launching import (
    fail_beside_a_log,
    free_port,
    launch_quickly,
    on_cpu,
    report,
    reported,
    return_code,
    wait_for_ever,
)
from programs import quick_start


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    launch_quickly(monkeypatch)


def started_by_slurm(worker, rank: int, port: int, *args) -> None:
    os.environ.update(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Peers that fail are noticed soon; those that work may be held up for three seconds.
    heartbeat.POLL_SECONDS, heartbeat.GRACE_SECONDS = 0.1 if worker is fail_while_the_other_hears_nothing else 0.3, 0.1
    sys.exit(on_cpu(worker, *args, num_processes=None))


def exit_codes_under_slurm(worker, *args) -> list[int | None]:
    port = free_port()
    tasks = [quick_start().Process(target=started_by_slurm, args=(worker, rank, port, *args)) for rank in (0, 1)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    return [task.exitcode for task in tasks]


def test_a_count_beside_a_rendezvous_is_ignored_and_reported(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert on_cpu(return_code, num_processes=4) == 0
    assert lines == ["num_processes = 4 is not used: 1 processes were started already"]


def test_joins_under_slurm_variables(tmp_path):
    assert exit_codes_under_slurm(report, str(tmp_path)) == [0, 0]
    assert [each[:3] for each in reported(tmp_path)] == [["2", "3.0", "0"]] * 2


def fail_while_the_other_hears_nothing(rank: int, world_size: int, failing: int, how: str, folder: str) -> int:
    process_collectives("cpu").barrier()
    if rank != failing:
        os.dup2(os.open(f"{folder}/screen", os.O_WRONLY | os.O_CREAT), 2)
        set_up_logging(is_main=rank == 0)
        add_log_file(Path(folder) / "train.log")
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
def test_a_failure_ends_the_peers_that_something_else_started(tmp_path, failing, how, codes):
    assert exit_codes_under_slurm(fail_while_the_other_hears_nothing, failing, how, str(tmp_path)) == codes
    for name in ("screen", "train.log"):
        assert (tmp_path / name).read_text().count(f"rank {1 - failing}: ended, rank {failing}") == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [("input", "item 7 is unknown: check it"), ("raised", "ValueError: the fault of this rank")],
)
def test_the_log_says_why_another_task_failed(tmp_path, how, said):
    log = tmp_path / "train.log"
    assert 0 not in exit_codes_under_slurm(fail_beside_a_log, how, str(log))
    assert re.fullmatch(rf"begun\n\S+ \S+ ERROR rank 1 failed: [^$]*{said}\n", log.read_text())


def finish_late(rank: int, world_size: int) -> int:
    time.sleep(rank)
    return 0


def test_a_process_that_is_done_waits_for_the_others():
    assert exit_codes_under_slurm(finish_late) == [0, 0]


def test_the_process_that_serves_the_store_waits_until_all_have_met():
    """Else it may fail at once, as on a wrong flag, and the others look for it until the timeout."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = "127.0.0.1", store.port, timedelta(seconds=60)
    begun = threading.Event()

    def serve() -> None:
        with heartbeat.heartbeat(0, 2, *place):
            begun.set()

    first = threading.Thread(target=serve)
    first.start()
    assert not begun.wait(0.5)
    with heartbeat.heartbeat(1, 2, *place):
        assert begun.wait(60)
    first.join()


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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "total"), [(2, "3.0"), (4, "10.0")])
def test_torchrun(tmp_path, count, total):
    finished = torchrun(tmp_path, failing=-1, count=count)
    assert finished.returncode == 0, finished.stderr
    assert reported(tmp_path) == [[total]] * count


def test_torchrun_starts_a_failed_run_again(tmp_path):
    """Torchrun's store outlives the failure of a start."""
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
    assert given_rendezvous(slurm, 0).port == found.port  # any: one that all find


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "two"}, "RANK='two'"),
        ({"RANK": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (
            {"MASTER_PORT": "70000"},
            "MASTER_PORT=70000 in the environment is no port: give one from 1 to 65535",
        ),
    ],
)
def test_a_rendezvous_that_makes_no_sense(changed, said):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    with pytest.raises(UserError, match=re.escape(said)):
        given_rendezvous({**given, **changed}, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-3],m", "n1"),
        ("n[07,9]", "n07"),
        ("n[1-2]-ib", "n1-ib"),
        ("", ""),
        ("r[2-3]n[05-06],m", "r2n05"),
    ],
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


@pytest.mark.parametrize(("count", "said"), [(0, "must be from 1 to 1024"), (3, "at most one process a GPU")])
def test_a_count_that_cannot_be(monkeypatch, capfd, count, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch(report, ("",), count, device_type="cuda") == 2
    assert said in capfd.readouterr().err
