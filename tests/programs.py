"""Programs run as by their users, in processes forked after the slow imports.

A server that has imported torch and its like is forked for each run, and the script is then executed as ``__main__``
with its own arguments, folder and output: what a shell starts, but for some seconds of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import IO, Any

import torch

from generative_recommenders.commands.ablation import jobs
from generative_recommenders.distributed import launch

ROOT = Path(__file__).resolve().parents[1]
SLOW_IMPORTS = [
    "generative_recommenders.commands.train",
    "generative_recommenders.commands.predict",
    "generative_recommenders.data.preparation.prepare",
    "generative_recommenders.compat",
    "generative_recommenders.run.report.pictures",
    "fbgemm_gpu",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "pandas",
    "pyarrow.dataset",
    "tensorboard.compat",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.tensorboard",
    "torch.profiler",
    "torch.testing",
    "torchmetrics",
    "pytest",
    "tests.ready",
]


def quick_start() -> ForkServerContext:
    """Processes forked from a server that has the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context


def run_program(
    program: str,
    *arguments: str,
    folder: Path = ROOT,
    timeout: float = 240,
    before: Callable[[], None] | None = None,
) -> CompletedProcess[str]:
    """``python program arguments`` in a folder, with one thread. program: a script below the project's folder, or the
    name of a module, as after ``python -m``. before: called in its process, to change what it may do. Training writes
    no report and draws no curves unless ``--report`` asks for it: they take longer than a small run."""
    script = str(ROOT / program) if program.endswith(".py") else program
    trains = program == "main.py" and not any(each.startswith(("--mode", "--dry_run")) for each in arguments)
    command = [script, *["--noreport"] * trains, *arguments]
    if "--report" not in arguments:
        before = partial(without_curves, before)
    return execute(command, folder, timeout, before)


def without_curves(before: Callable[[], None] | None = None) -> None:
    """This process draws no ``curves.png``, a third of what a small run costs."""
    from generative_recommenders.run.report import pictures

    pictures.plot_curves = lambda *arguments: None
    if before is not None:
        before()


def forked_members() -> None:
    """This process forks the members of a run, which it spawns for users, as it has the imports."""
    launch.START_METHOD = "fork"


def forked_jobs() -> None:
    """This process has the runs of an ablation or a reproduction forked, which it starts anew for users; by a process
    that has no threads yet, since this one gets some."""
    ours, theirs = multiprocessing.Pipe()
    if os.fork() == 0:  # no `Process`, whose end this one would wait for
        ours.close()
        _serve_jobs(theirs)
    theirs.close()

    def popen(command: list[str], stdout: IO[bytes], env: Mapping[str, str], **_: Any) -> ForkedJob:
        return ForkedJob(ours, command[2:], stdout.name, dict(env))

    jobs.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # type: ignore[assignment]


class ForkedJob:
    """A module's process, with what `jobs` asks of a `subprocess.Popen`."""

    def __init__(self, server: Connection, words: list[str], log: Any, environment: dict[str, str]) -> None:
        self.server = server
        server.send((words, log, environment))
        self.pid: int = server.recv()

    def poll(self) -> int | None:
        self.server.send(self.pid)
        return self.server.recv()

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a run", timeout)
            time.sleep(0.02)


def _serve_jobs(requests: Connection) -> None:
    """Starts modules, and tells their exit codes, until nobody asks any more."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes: dict[int, BaseProcess] = {}
    while True:
        try:
            asked = requests.recv()
        except EOFError:
            os._exit(0)
        if isinstance(asked, int):
            requests.send(processes[asked].exitcode)
        else:
            process = multiprocessing.get_context("fork").Process(target=_run_module, args=asked)
            process.start()
            processes[process.pid or 0] = process
            requests.send(process.pid)


def _run_module(words: list[str], log: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def started(
    words: list[str], folder: Path, out: Path, err: Path, before: Callable[[], None] | None = None
) -> BaseProcess:
    """The process of a script or module with its arguments, as they stand, and its output in files."""
    arguments = (words, str(folder), str(out), str(err), before)
    process = quick_start().Process(target=_execute, args=arguments)
    process.start()
    return process


def execute(
    words: list[str], folder: Path, timeout: float = 240, before: Callable[[], None] | None = None
) -> CompletedProcess[str]:
    """The program of a script or module with its arguments, as they stand."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        process = started(words, folder, out, err, before)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{words} took more than {timeout} s: {err.read_text()[-3000:]}")
        assert process.exitcode is not None
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _execute(words: list[str], folder: str, out: str, err: str, before: Callable[[], None] | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path[0] = str(ROOT)
    sys.argv = words
    if before is not None:
        before()
    if words[0].endswith(".py"):
        folder_of_script = str(Path(words[0]).resolve().parent)
        sys.path[:1] = [str(ROOT)] if folder_of_script == str(ROOT) else [folder_of_script, str(ROOT)]
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
