"""Programs run as by their users, in processes forked after the slow imports.

A server that has imported torch and its like is forked for each run, and the script is then executed as ``__main__`` with
its own arguments, folder and output: what a shell starts, but for some seconds of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess

import torch

ROOT = Path(__file__).resolve().parents[1]
SLOW_IMPORTS = [
    "generative_recommenders.commands.train",
    "generative_recommenders.compat",
    "matplotlib.pyplot",
    "tensorboard.compat",
    "torch.distributed",
    "torch.utils.tensorboard",
    "torch.testing",
    "torchmetrics",
    "pytest",
]


def quick_start() -> ForkServerContext:
    """Processes forked from a server that has the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context


def run_program(
    script: str, *arguments: str, timeout: float = 240, before: Callable[[], None] | None = None
) -> CompletedProcess[str]:
    """``python script arguments`` in the project's folder, with one thread; script: below it. before: called in its process,
    to change what it may do. Training writes no report unless ``--report`` asks for it, since its pictures take seconds."""
    command = [str(ROOT / script), *["--noreport"] * (script == "main.py"), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = quick_start().Process(target=_execute, args=(command, str(out), str(err), before))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{command} took more than {timeout} s: {err.read_text()[-3000:]}")
        assert process.exitcode is not None
        return CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _execute(command: list[str], out: str, err: str, before: Callable[[], None] | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = command
    sys.path[0] = str(ROOT)
    if before is not None:
        before()
    runpy.run_path(command[0], run_name="__main__")
