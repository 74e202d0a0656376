"""Helpers of the tests that launch processes: workers that report, on a CPU, without inherited launch variables."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from generative_recommenders.distributed import launch as launching
from generative_recommenders.distributed.launch import launch, log_failures_to
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.errors import UserError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def launch_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked from a server that has the imports done, and the environment names no others."""
    # Not above: a spawned process imports this module for its worker, and needs none of it.
    from programs import quick_start

    quick_start()
    monkeypatch.setattr(launching, "START_METHOD", "forkserver")
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


def wait_for_ever(*_) -> int:
    while True:
        time.sleep(0.05)


def return_code(rank: int, world_size: int) -> int:
    process_collectives("cpu").barrier()
    return 3 * rank


def fail_beside_a_log(rank: int, world_size: int, how: str, log: str) -> int:
    """Rank 1 fails while rank 0, whose log has a line, waits for it; or both do, and the line is that of the fault."""
    fault = UserError("item 7 is unknown: check it")
    if rank == 0:
        Path(log).write_text(f"UserError: {fault}\n" if how == "both" else "begun\n")
        log_failures_to(Path(log))
    group = process_collectives("cpu")
    group.barrier()
    if how == "both" or (rank == 1 and how == "input"):
        raise fault
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        raise ValueError("the fault of this rank")
    group.barrier()
    return 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
