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
    "generative_recommenders.commands.predict",
    "generative_recommenders.data.preparation.prepare",
    "generative_recommenders.compat",
    "generative_recommenders.run.report",
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
    """``python program arguments`` in a folder, with one thread. program: a script below the project's folder, or the name of
    a module, as behind ``python -m``. before: called in its process, to change what it may do. Training writes no report
    unless ``--report`` asks for it, since its pictures take seconds."""
    script = str(ROOT / program) if program.endswith(".py") else program
    command = [script, *["--noreport"] * (program == "main.py"), *arguments]
    return execute(command, folder, timeout, before)


def execute(
    words: list[str], folder: Path, timeout: float = 240, before: Callable[[], None] | None = None
) -> CompletedProcess[str]:
    """The program of a script or module with its arguments, as they stand."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        process = quick_start().Process(
            target=_execute, args=(words, str(folder), str(out), str(err), before)
        )
        process.start()
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
