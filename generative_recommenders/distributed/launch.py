"""Starts the processes of a run: in this process, one a GPU on this host, or as a member of a given
rendezvous."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from absl import logging

from generative_recommenders.distributed.heartbeat import FailureWatch, attempt
from generative_recommenders.distributed.memory_faults import out_of_memory
from generative_recommenders.distributed.process_group import join_group, process_collectives, process_device
from generative_recommenders.distributed.spawned import run_spawned
from generative_recommenders.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in one exchange before it takes them for lost."""

DEFAULT_PORT = 29500

Worker = Callable[..., int]
"""``worker(rank, world_size, *args) -> exit code``. Sees its peers through
`distributed.process_collectives`."""


@dataclass(frozen=True)
class Rendezvous:
    """Where a process that something else started meets its peers."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def launch(
    worker: Worker,
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    master_port: int | None = None,
    device_type: str | None = None,
    timeout: timedelta = TIMEOUT,
) -> int:
    """Runs ``worker(rank, world_size, *args)`` in every process of the run; returns the exit code.

    Under torchrun (RANK, WORLD_SIZE, ...) or SLURM's srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...) this process
    joins the given rendezvous, and num_processes is not used. Else ``num_processes`` run on this host, bound to its
    loopback interface: one a GPU, or one, where None. One process runs right here; more are spawned, so worker and
    args must be picklable.

    device_type: "cpu" or "cuda", None for a GPU where there is one. master_port: 0 for any; one that is in use is
    replaced; None: `DEFAULT_PORT`, or under SLURM one by the numbers of job and step. A worker's UserError is printed
    as its one line and gives the exit code; a failed allocation is one line too, exit code 1. Any other failure of a
    spawned worker ends all of them, with its traceback, exit code 1; of this process it is raised.
    """
    given = given_rendezvous(os.environ, master_port)
    if given is not None:
        if num_processes not in (None, given.world_size) and given.rank == 0:
            logging.warning(
                "num_processes = %d is not used: %d processes were started already",
                num_processes, given.world_size,
            )  # fmt: skip
        return _reported(
            lambda: _join_given(given, worker, args, device_type, timeout), f"rank {given.rank}: "
        )
    port = DEFAULT_PORT if master_port is None else master_port
    return _reported(lambda: _run_here(worker, args, num_processes, port, device_type, timeout))


def given_rendezvous(environment: Mapping[str, str], port: int | None = None) -> Rendezvous | None:
    """The rendezvous that torchrun's or srun's variables name; None where nothing started several processes, as
    in the batch script of a SLURM job, which has a rank and a number of tasks but no peers.

    Raises UserError where a variable that is needed is missing or makes no sense.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return None
    rank, world_size = (_integer(environment, name) for name in names[:2])
    local_rank = _integer(environment, names[2]) if names[2] in environment else rank
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names[0]}={rank} does not fit {names[1]}={world_size}: ranks are 0 to {world_size - 1}"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if not address and world_size > 1:
        raise UserError(
            f"{names[1]} is {world_size} but MASTER_ADDR is not set: name the host of rank 0 in it"
        )
    if "MASTER_PORT" in environment:
        port = _integer(environment, "MASTER_PORT")
    elif port is None:
        port = default_port(environment)
    return Rendezvous(rank, world_size, local_rank, address, port)


def default_port(environment: Mapping[str, str]) -> int:
    """A port that jobs and steps on one host share seldom."""
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" not in environment:
        return DEFAULT_PORT
    return (
        10_000 + (8 * _integer(environment, "SLURM_JOB_ID") + _integer(environment, "SLURM_STEP_ID")) % 20_000
    )


def first_host(node_list: str) -> str:
    """First host of a list as SLURM writes it: ``node[03-05,9],other`` is node03."""
    found = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", node_list)
    return "".join(part or "" for part in found.groups()) if found else ""


def _join_given(
    given: Rendezvous, worker: Worker, args: Sequence[Any], device_type: str | None, timeout: timedelta
) -> int:
    os.environ["LOCAL_RANK"] = str(given.local_rank)
    if given.world_size == 1:
        return worker(0, 1, *args)
    os.environ.update(MASTER_ADDR=given.address, MASTER_PORT=str(given.port))
    neighbours = os.environ.get("LOCAL_WORLD_SIZE")  # SLURM binds each task to its own cores
    store = _store_of_torchrun(given, timeout)
    join_group(given.rank, given.world_size, int(neighbours or 1), device_type, timeout, store)
    with FailureWatch(given.rank, given.world_size, given.address, given.port, timeout):
        code = worker(given.rank, given.world_size, *args)
        process_collectives(process_device(device_type)).barrier()
    dist.destroy_process_group()
    return code


def _store_of_torchrun(given: Rendezvous, timeout: timedelta) -> dist.Store | None:
    """Where torchrun serves the store: the part of it for this start of the run. None: rank 0 serves one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(given.address, given.port, None, False, timeout=timeout)
    return dist.PrefixStore(f"group/{attempt(os.environ)}", store)


def _run_here(
    worker: Worker,
    args: Sequence[Any],
    num_processes: int | None,
    master_port: int,
    device_type: str | None,
    timeout: timedelta,
) -> int:
    count = _process_count(num_processes, device_type)
    if count == 1:
        return worker(0, 1, *args)
    return run_spawned(worker, tuple(args), count, master_port, device_type, timeout)


def _process_count(requested: int | None, device_type: str | None) -> int:
    use_gpus = process_device(device_type).type == "cuda"
    gpus = torch.cuda.device_count() if use_gpus else 0
    if requested is None:
        return max(gpus, 1)
    if requested < 1:
        raise UserError(f"num_processes is {requested}; it must be 1 or more")
    if use_gpus and requested > gpus:
        raise UserError(f"num_processes is {requested} but there are {gpus} GPUs: at most one process a GPU")
    return requested


def _reported(run: Callable[[], int], prefix: str = "") -> int:
    try:
        return run()
    except UserError as error:
        line, code = str(error), error.exit_code
    except (MemoryError, RuntimeError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        line, code = found, 1
    logging.flush()
    print(f"error: {prefix}{line}", file=sys.stderr, flush=True)
    return code


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name}={environment[name]!r} in the environment is not a number") from None
