"""Processes of an ablation's runs: as many at a time as there are GPUs, or sets of cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from absl import logging

import generative_recommenders
from generative_recommenders.commands.ablation.plan import Run
from generative_recommenders.commands.ablation.records import is_trained, ranks_of
from generative_recommenders.errors import UserError

IMPORTS = str(Path(generative_recommenders.__file__).parents[1])
"""Where runs find this package, installed or not."""
POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
"""Time for a run to write its checkpoint when all are stopped."""


@dataclass(frozen=True)
class Slot:
    """Where one run computes. cores: of the host, none for all."""

    environment: Mapping[str, str]
    cores: tuple[int, ...] = ()


def slots(jobs: int | None) -> list[Slot]:
    """One slot a job: a GPU each, which more jobs than GPUs share, or a share of the cores.

    jobs: as many as GPUs where None, or one. UserError without a GPU for more jobs than there are cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus := [str(i) for i in range(torch.cuda.device_count())]:
        visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each] or gpus
        names = [visible[i % len(visible)] for i in range(jobs or len(visible))]
        # Threads of a run that wait for its GPU spin on their cores, which other runs on this host need.
        threads = str(max(1, len(cores) // len(names)))
        return [Slot({"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": threads}) for name in names]
    count = jobs or 1
    if count > len(cores):
        raise UserError(f"--jobs={count} on {len(cores)} cores: give each run one at least")
    shares = [tuple(cores[i::count]) for i in range(count)]
    return [Slot({"OMP_NUM_THREADS": str(len(own))}, own) for own in shares]


def next_command(run: Run, flags: Sequence[str], training: Sequence[str] = ()) -> list[str] | None:
    """The next command of a run: its training, or the ranks of its users where it kept none; None where it is done.

    flags: for both. training: for training alone.
    """
    shared = [
        sys.executable, "-m", "generative_recommenders", "train", f"--run_dir={run.folder}", "--num_processes=1",
        f"--users_metrics={run.measured}", *flags,
    ]  # fmt: skip
    if not is_trained(run):
        run.measured.unlink(missing_ok=True)
        return [*shared, f"--gin_config_file={run.config}", "--auto_resume", *training]
    if ranks_of(run) is None:
        return [*shared, "--mode=evaluate"]
    return None


@dataclass
class _RunningJob:
    run: Run
    slot: Slot
    command: list[str]

    def __post_init__(self) -> None:
        """Starts the command, in a session of its own, so that a Ctrl-C at the terminal reaches it through us alone."""
        paths = os.pathsep.join(filter(None, (IMPORTS, os.environ.get("PYTHONPATH"))))
        # Asks the kernel for SIGTERM, which has a run write its checkpoint, where a killed ablation can send none.
        stops_with_us = partial(torch.multiprocessing._prctl_pr_set_pdeathsig, signal.SIGTERM)  # type: ignore[attr-defined]
        with open(self.run.log, "ab") as log:
            self.log_start = log.tell()  # before it are the lines of earlier starts
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths, **self.slot.environment},
                preexec_fn=stops_with_us,  # noqa: PLW1509, one system call
            )  # fmt: skip
        if self.slot.cores:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, self.slot.cores)

    def last_line(self) -> str:
        """The last error that the command printed, else the last line."""
        text = self.run.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line for each in text.splitlines() if (line := each.strip())] or ["no output"]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def run_all(
    runs: Iterator[Run],
    done: Callable[[Run, str | None], None],
    free: Sequence[Slot],
    command_of: Callable[[Run], list[str] | None],
) -> None:
    """Starts runs until there is no next one, and tells of each that is done, with its line where it failed.

    runs: asked for the next one when a slot is free, so that a search has learnt of those done by then. command_of: see
    `next_command`. SIGTERM and Ctrl-C, which raise KeyboardInterrupt here, stop all processes, each with a checkpoint.
    """
    free = list(free)
    running: list[_RunningJob] = []
    try:
        while True:
            while free and (run := next(runs, None)) is not None:
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                if (command := command_of(run)) is None:
                    done(run, None)
                    continue
                run.config.write_text(run.resolved, encoding="utf-8")
                logging.info("%s begins", run.name)
                running.append(_RunningJob(run, free.pop(), command))
            if not running:
                return
            for each in list(running):
                code = each.process.poll()
                if code is None:
                    continue
                running.remove(each)
                # Trained, it may still have kept no ranks of its users.
                command = command_of(each.run) if code == 0 else None
                if command is not None and command != each.command:
                    running.append(_RunningJob(each.run, each.slot, command))
                    continue
                free.append(each.slot)
                failed = code != 0 or command is not None
                done(each.run, f"{each.last_line()} (exit code {code}, {each.run.log})" if failed else None)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        _stop([each.process for each in running])


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, then SIGKILL to what is left after `STOP_SECONDS`, or at a second Ctrl-C."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + STOP_SECONDS
    try:
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        logging.warning("runs that did not stop in time are killed")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
