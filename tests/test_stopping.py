"""SIGTERM and Ctrl-C end whatever a program does within 5 seconds, with exit code 130, and cost no progress."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import CONFIG, ROOT, assert_same_run, options_of, run_alone, run_two
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.evaluate import evaluate_worker
from generative_recommenders.commands.setup import Options
from generative_recommenders.commands.train import train_worker
from generative_recommenders.data.preparation import prepare
from generative_recommenders.distributed.launch import launch
from generative_recommenders.distributed.signals import INTERRUPTED, interrupts
from generative_recommenders.evaluation import evaluator
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from programs import forked_members, quick_start, without_curves
from tiny_data import ragged_sequences, tiny_dataset

IN_TIME = 5.0


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    (root / "prepared").mkdir()
    tiny_dataset(root / "prepared", ragged_sequences(57, 30, seed=5))
    (root / "x.gin").write_text(CONFIG.replace("num_epochs = 4", "num_epochs = 2"))
    return root


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_alone(options_of(data_root, run)) == 0
    return run


OF_TWO = ("train_fn.local_batch_size = 4",)
"""The batch of one process, shared by two."""


@pytest.fixture(scope="module")
def whole_of_two(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    assert run_two(options_of(data_root, run, *OF_TWO)) == 0
    return run


def slow_from(owner: Any, name: str, call: int, mark: str) -> None:
    """From this call on a function takes its time."""
    original, calls = getattr(owner, name), []

    def slow(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            Path(mark).touch()
            time.sleep(0.5)
        return original(*args, **named)

    setattr(owner, name, slow)


def slow_evaluation(call: int, mark: str) -> None:
    """From now on ranks are counted for a few users at a time, slowly from this call on."""
    evaluator.USERS = 4
    slow_from(evaluator, "product_ranks", call, mark)


def endless(owner: Any, name: str, mark: str) -> None:
    """The function takes an hour."""

    def wait(*args: Any, **named: Any) -> Any:
        Path(mark).touch()
        time.sleep(3600)

    setattr(owner, name, wait)


def slow_worker(rank: int, world_size: int, options: Options, mode: str, mark: str) -> int:
    """A run whose given part takes long."""
    mark = f"{mark}{rank}"
    without_curves()
    if mode == "baselines":
        endless(ModelEvaluation, "baselines", mark)
    elif mode == "evaluate":
        slow_evaluation(1, mark)
        return evaluate_worker(rank, world_size, options)
    else:
        original = getattr(ModelEvaluation, mode)

        def slow(*args: Any, **named: Any) -> Any:
            if mode == "test" or args[2] is None:  # of all users: partial evaluations come before
                slow_evaluation(2, mark)
            return original(*args, **named)

        setattr(ModelEvaluation, mode, slow)
    return train_worker(rank, world_size, options)


def as_a_program(options: Options, mode: str, mark: str, world_size: int) -> None:
    forked_members()
    descriptor = os.open(f"{mark}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        with interrupts():
            code = launch(slow_worker, (options, mode, mark), world_size, 0, device_type="cpu")
    except KeyboardInterrupt:
        code = INTERRUPTED
    os._exit(code)


def stopped(process: BaseProcess, ready: Callable[[], bool], number: int) -> float:
    """Starts the process, sends the signal once it is ready, and returns how long it took to end."""
    process.start()
    deadline = time.monotonic() + 60
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, number)
    began = time.monotonic()
    process.join(30)
    assert process.exitcode == INTERRUPTED
    return time.monotonic() - began


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["validation", "test", "baselines"])
def test_a_training_run_stops_wherever_it_is_and_loses_nothing(
    data_root: Path, tmp_path: Path, whole: Path, whole_of_two: Path, mode: str, world_size: int
) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    start, expected, bindings = (run_alone, whole, ()) if world_size == 1 else (run_two, whole_of_two, OF_TWO)
    options = options_of(data_root, run, *bindings)
    process = quick_start().Process(target=as_a_program, args=(options, mode, str(mark), world_size))
    number = signal.SIGTERM if mode != "test" else signal.SIGINT
    took = stopped(process, Path(f"{mark}0").exists, number)
    log = Path(f"{mark}.log").read_text()
    assert took < IN_TIME, log
    assert "Traceback" not in log and "--resume" in log
    newest = CheckpointStore(run / "checkpoints", read_only=True).load_newest()
    assert newest is not None
    assert start(options_of(data_root, run, *bindings)) == 0
    assert_same_run(run, expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_stops(data_root: Path, tmp_path: Path, whole: Path, world_size: int) -> None:
    run, mark = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "mark"
    options = Options((), (), data_root, str(run), False, None, False, report=False)
    process = quick_start().Process(target=as_a_program, args=(options, "evaluate", str(mark), world_size))
    took = stopped(process, Path(f"{mark}0").exists, signal.SIGTERM)
    log = Path(f"{mark}.log").read_text()
    assert took < IN_TIME, log
    assert "Traceback" not in log and "failed" not in log


def prepare_slowly(arguments: list[str], mark: str) -> None:
    endless(prepare, "write_folder", mark)
    sys.argv = ["preprocess_public_data.py", *arguments]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preparation_stops_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "r.csv").write_text("".join(f"u{i % 97},i{i % 31},{i % 5},{i}\n" for i in range(5000)))
    arguments = ["--dataset=csv", f"--raw_path={tmp_path / 'r.csv'}", "--name=mine", "--header=no"]
    arguments += ["--columns=user,item,rating,timestamp", f"--data_root={tmp_path}"]
    process = quick_start().Process(target=prepare_slowly, args=(arguments, str(tmp_path / "mark")))
    assert stopped(process, (tmp_path / "mark").exists, number) < IN_TIME
    assert [path.name for path in (tmp_path / "prepared").iterdir() if not path.name.endswith(".lock")] == []


def evaluate_slowly(arguments: list[str], mark: str) -> None:
    slow_evaluation(1, mark)
    sys.argv = ["main.py", *arguments]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def test_main_stops(data_root: Path, tmp_path: Path, whole: Path) -> None:
    run, mark = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "mark"
    arguments = ["--mode=evaluate", f"--data_root={data_root}", f"--run_dir={run}"]
    process = quick_start().Process(target=evaluate_slowly, args=(arguments, str(mark)))
    assert stopped(process, mark.exists, signal.SIGTERM) < IN_TIME
