"""Launch of a run's processes: this one, several on this host by torch.multiprocessing, or those of torchrun or
SLURM."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from absl import logging
from torch.multiprocessing import ProcessExitedException, start_processes
from tqdm import tqdm

from generative_recommenders.distributed.heartbeat import heartbeat
from generative_recommenders.distributed.memory import out_of_memory
from generative_recommenders.distributed.process_group import join_group, process_collectives, process_device
from generative_recommenders.distributed.rendezvous import DEFAULT_PORT, Rendezvous, given_rendezvous
from generative_recommenders.distributed.signals import INTERRUPTED, handled_signals, interrupts
from generative_recommenders.errors import UserError, fault_of

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in one exchange before it takes them for lost."""
START_METHOD = "spawn"
LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 5.0
"""Time for the other processes to end by themselves after a failure, and again between SIGTERM and SIGKILL."""
POLL_SECONDS = 0.2
"""How long a signal may wait until it is relayed."""
SETTLE_SECONDS = 0.5
"""Delay before a process that raised ends: one that was killed, whose loss may be the cause, is then seen first."""
MOST_PROCESSES = 1024
"""On one host, which has fewer cores and GPUs: a larger number is a slip, and would take the host's memory."""
REPORT_BYTES = 30_000
"""Of a longer error message both ends are shown."""
_stores: list[dist.Store] = []
"""Where the processes of the run leave their failures: at most one store, once this process has met the others."""

Worker = Callable[..., int]
"""``worker(rank, world_size, *args) -> exit code``. Sees its peers through
`distributed.process_collectives`."""


@dataclass(frozen=True)
class Job:
    """Arguments of every process of a run; pickled for those that are spawned."""

    worker: Worker
    args: tuple[Any, ...]
    world_size: int
    device_type: str | None
    timeout: timedelta

    def work(self, rank: int) -> int:
        """The worker's exit code, after a barrier: an early exit would look like a lost peer to the others, of which
        one may still be writing the checkpoint."""
        code = self.worker(rank, self.world_size, *self.args)
        if code in (0, INTERRUPTED):
            process_collectives(process_device(self.device_type)).barrier()
            # DDP's reducer owns the process group too. Were it the last to go, it would wait, with the interpreter's
            # lock in hand, for a thread of the group that waits for that lock.
            gc.collect()
            dist.destroy_process_group()
        return code


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
    replaced; None: `DEFAULT_PORT`; under SLURM 0 and None are one by the numbers of job and step. A worker's UserError
    is printed as its one line and gives the exit code; a failed allocation is one line too, exit code 1. Any other
    failure of a spawned worker ends all of them, with its traceback, exit code 1; of this process it is raised.
    """
    prefix = ""
    try:
        given = given_rendezvous(os.environ, master_port)
        if given is not None:
            prefix = f"rank {given.rank}: "
            if num_processes not in (None, given.world_size) and given.rank == 0:
                logging.warning(
                    "num_processes = %d is not used: %d processes were started already",
                    num_processes, given.world_size,
                )  # fmt: skip
            return _join_given(given, Job(worker, tuple(args), given.world_size, device_type, timeout))
        count = _process_count(num_processes, device_type)
        if count == 1:
            return worker(0, 1, *args)
        port = DEFAULT_PORT if master_port is None else master_port
        return _spawn(Job(worker, tuple(args), count, device_type, timeout), port)
    except UserError as error:
        logging.debug("the fault came from here", exc_info=True)
        line, code = str(error), error.exit_code
    except (MemoryError, RuntimeError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        line, code = found, 1
    logging.flush()
    print(f"error: {prefix}{line}", file=sys.stderr, flush=True)
    return code


def log_failures_to(path: Path) -> None:
    """Names the run's log file, a call for the main process: where any process of the run fails, the reason is added to
    it."""
    for store in _stores:
        store.set("log", json.dumps(str(path.absolute())))


def _process_count(requested: int | None, device_type: str | None) -> int:
    use_gpus = process_device(device_type).type == "cuda"
    gpus = torch.cuda.device_count() if use_gpus else 0
    if requested is None:
        return max(gpus, 1)
    if not 1 <= requested <= MOST_PROCESSES:
        raise UserError(f"num_processes is {requested}; it must be from 1 to {MOST_PROCESSES}")
    if use_gpus and requested > gpus:
        raise UserError(f"num_processes is {requested} and the number of GPUs {gpus}: at most one process a GPU")
    return requested


def _join_given(given: Rendezvous, job: Job) -> int:
    os.environ["LOCAL_RANK"] = str(given.local_rank)
    if given.world_size == 1:
        return job.worker(0, 1, *job.args)
    os.environ.update(MASTER_ADDR=given.address, MASTER_PORT=str(given.port))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # SLURM binds each task to its own cores
    store: dist.Store | None = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store may outlive a failed start, whose addresses must not be met again
        agent = dist.TCPStore(given.address, given.port, None, is_master=False, timeout=job.timeout)
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", agent)
    join_group(given.rank, given.world_size, neighbours, job.device_type, job.timeout, store)
    with contextlib.ExitStack() as peers:
        if not given.is_supervised:
            watched = heartbeat(given.rank, given.world_size, given.address, given.port, job.timeout)
            store = peers.enter_context(watched)
        _stores[:] = [] if store is None else [store]
        try:
            return job.work(given.rank)
        except BaseException as error:
            for store in _stores:
                if isinstance(error, Exception):
                    _leave_failure(store, given.rank, *_code_and_text(error))
                if given.rank == 0:
                    _log_failure(store)
            raise
        finally:
            _stores.clear()


def _spawn(job: Job, port: int) -> int:
    """Runs a job on this host, relays SIGTERM and Ctrl-C to its processes, and ends all when one fails."""
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError:
        listener = socket.create_server((LOOPBACK, 0))
        logging.warning("port %d is in use; the processes meet at port %d", port, listener.getsockname()[1])
    port = listener.getsockname()[1]
    # The store closes the descriptor. Without one it would listen on all interfaces.
    store = dist.TCPStore(
        LOOPBACK, port, None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    received: list[int] = []
    with handled_signals(received.append):
        # Started within: a signal that comes meanwhile is kept, and relayed to those that are there.
        context = start_processes(_spawned, (job, port), job.world_size, join=False, start_method=START_METHOD)
        relayed = 0
        try:
            while not context.join(POLL_SECONDS, grace_period=GRACE_SECONDS):
                for number in received[relayed:]:
                    for rank, process in enumerate(context.processes):
                        if process.is_alive():
                            # One that still imports what it needs would answer a Ctrl-C with a traceback.
                            known = number if store.check([f"handles signals {rank}"]) else signal.SIGTERM
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(process.pid, known)
                    relayed += 1
            return 0
        except ProcessExitedException as error:
            return _report(error, received, store)


def _report(error: ProcessExitedException, received: list[int], store: dist.Store) -> int:
    """Prints why the run ended; returns its exit code."""
    logging.flush()
    rank, code = error.error_index, error.exit_code
    if received and (code < 0 or code == INTERRUPTED):
        if code < 0 or store.check(["failure"]):  # else the run has said how it is resumed
            print("error: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    if code < 0:
        often = ", which is often the system running out of memory" if -code == signal.SIGKILL else ""
        failure = json.dumps([rank, None, f"it was killed by {error.signal_name}{often}"])
        store.set("failure", failure)
    elif not store.check(["failure"]):
        return code
    _log_failure(store)
    rank, code, text = json.loads(store.get("failure"))
    if code is None:
        print(f"rank {rank} failed, the other processes are ended: {text}", file=sys.stderr, flush=True)
        return 1
    if text:
        print(f"error: {text}", file=sys.stderr, flush=True)
    return int(code)


def _spawned(rank: int, job: Job, port: int) -> None:
    """One spawned process: it leaves the first failure of the run in the store, and its exit code to the launcher."""
    os.setpgrp()  # the terminal's Ctrl-C reaches the launcher alone, which relays it once
    # The kernel sends a killed launcher's children one signal for each of its threads that outlives another. Torch asks
    # for SIGINT, of which a second one ends a run at once, without a checkpoint.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    os.environ["LOCAL_RANK"] = str(rank)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)
    store = dist.TCPStore(LOOPBACK, port, None, is_master=False, timeout=job.timeout)
    _stores[:] = [store]
    # Of the process alone: what all could share, `os._exit` would leave behind, and Python tell of it.
    tqdm.set_lock(threading.RLock())
    code: int | None = None
    # An interrupted process ends while its peers still talk to it: their error is then seen together with their own
    # signal, which comes first here.
    with contextlib.suppress(KeyboardInterrupt), interrupts():
        store.set(f"handles signals {rank}", "")
        ended: int | None = None  # by an unexpected error; else the worker's code or that of its UserError
        text = ""
        try:
            join_group(rank, job.world_size, job.world_size, job.device_type, job.timeout, store)
            ended = job.work(rank)
        except Exception as error:  # whatever it is, it is reported and ends the run
            ended, text = _code_and_text(error)
            if ended is not None:
                logging.debug("the fault came from here", exc_info=True)
        if ended not in (0, INTERRUPTED):
            _leave_failure(store, rank, ended, text)
        if ended is None:
            time.sleep(SETTLE_SECONDS)
        code = 1 if ended is None else ended
    if code is None:
        code = INTERRUPTED
        _leave_failure(store, rank, code, "interrupted")
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # without waiting for peers that may never answer


def _code_and_text(error: Exception) -> tuple[int | None, str]:
    """Exit code and line of a fault that the program is not to blame for; None and the traceback of any other error."""
    if (fault := fault_of(error)) is not None:
        return fault.exit_code, str(fault)
    return None, out_of_memory(error) or "".join(traceback.format_exception(error))


def _leave_failure(store: dist.Store, rank: int, code: int | None, text: str) -> None:
    """Leaves why a process ended; the first failure of all processes stands."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) > REPORT_BYTES:
        encoded = encoded[: REPORT_BYTES // 2] + b" [...] " + encoded[-REPORT_BYTES // 2 :]
    failure = json.dumps([rank, code, encoded.decode(errors="ignore")])
    with contextlib.suppress(dist.DistError):  # what serves the store is gone
        store.compare_set("failure", "", failure)


def _log_failure(store: dist.Store) -> None:
    """Adds the failure that was left to the log file, where the main process did not end it with the same line."""
    with contextlib.suppress(dist.DistError, OSError):  # the screen has it too
        if not store.check(["failure"]) or not store.check(["log"]):
            return
        rank, _, text = json.loads(store.get("failure"))
        path = Path(json.loads(store.get("log")))
        if path.is_symlink() or path.read_text(errors="replace").rstrip().endswith(text.strip()):
            return
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR rank {rank} failed: {text.strip()}\n")
