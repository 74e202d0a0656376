"""Rendezvous given by torchrun's or SLURM's environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from generative_recommenders.errors import UserError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Rendezvous:
    """Where a process that something else started meets its peers.

    is_supervised: torchrun started it, which ends all processes of a run when one of them fails.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    is_supervised: bool


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
        raise UserError(f"{names[0]}={rank} does not fit {names[1]}={world_size}: ranks are 0 to {world_size - 1}")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if not address and world_size > 1:
        raise UserError(f"{names[1]} is {world_size} but MASTER_ADDR is not set: name the host of rank 0 in it")
    if "MASTER_PORT" in environment:
        port = _integer(environment, "MASTER_PORT")
        if not 0 <= port <= 65535:
            raise UserError(f"MASTER_PORT={port} in the environment is no port: give one from 1 to 65535")
    elif not port:  # any, which the others could not know
        port = DEFAULT_PORT
        if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" in environment:
            # Jobs and steps on one host share it seldom.
            job, step = (_integer(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            port = 10_000 + (8 * job + step) % 20_000
    return Rendezvous(rank, world_size, local_rank, address, port, "TORCHELASTIC_RUN_ID" in environment)


def first_host(node_list: str) -> str:
    """First host of a list as SLURM writes it: ``node[03-05,9],other`` is node03."""
    first = re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", node_list)
    return first.partition(",")[0]


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name}={environment[name]!r} in the environment is not a number") from None
