"""Small runs that are killed at any call of any function, and what must hold of them afterwards."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.setup import Options
from generative_recommenders.commands.train import train_worker
from generative_recommenders.distributed import launch as launching
from generative_recommenders.distributed.launch import launch
from programs import quick_start, without_curves

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
train_fn.dataset_name = "tiny"
train_fn.max_sequence_length = 10
train_fn.local_batch_size = 8
train_fn.eval_batch_size = 16
train_fn.item_embedding_dim = 8
sasrec_encoder.ffn_hidden_dim = 8
sasrec_encoder.num_blocks = 1
train_fn.sampling_strategy = "local"
train_fn.num_negatives = 4
train_fn.num_epochs = 4
train_fn.eval_interval = 3
train_fn.num_warmup_steps = 5
train_fn.save_ckpt_every_n = 1
"""
PACKAGE = "generative_recommenders."
MEASURED = ("seconds", "spent", "environment", "train/tokens_per_second")
"""Records of a clock and of the machine, which no two runs share."""
MOMENTS = {
    "checkpoint.store.CheckpointStore.attach": 1,
    "checkpoint.store.write_tensors": 4,
    "checkpoint.store.write_manifest": 4,
    "checkpoint.store.sync": 8,
    "checkpoint.store.os.rename": 5,
    "evaluation.model_evaluation.ModelEvaluation.validation": 14,
    "evaluation.model_evaluation.ModelEvaluation.test": 1,
    "training.trainer.Trainer.run_step": 32,
    "training.trainer.load_model": 1,
    "run.directory.RunFolder.write_metrics": 15,
    "run.directory.RunFolder.write_scalars": 14,
    "run.directory.os.replace": 1,
}
"""Functions that a run calls, and how often about: a kill strikes before or after one of these calls."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """kill -9 of the process of this rank at the call-th call of a function, before or after it."""

    function: str
    call: int
    after: bool
    rank: int = 0


def options_of(data_root: Path, run: Path, *bindings: str) -> Options:
    """Of a new run, or of one that resumes where its folder exists."""
    return Options((str(data_root / "x.gin"),), bindings, data_root, str(run), run.exists(), None, False, report=False)


def arm(kill: Kill) -> None:
    package, module, *inner, name = kill.function.split(".")
    owner: Any = importlib.import_module(f"{PACKAGE}{package}.{module}")
    for each in inner:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def struck(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == kill.call and not kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **named)
        if len(calls) == kill.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, struck)


def armed_worker(rank: int, world_size: int, options: Options, kill: Kill | None) -> int:
    torch.set_num_threads(1)
    without_curves()
    if kill is not None and rank == kill.rank:
        arm(kill)
    return train_worker(rank, world_size, options)


def alone(options: Options, kill: Kill | None, log: str) -> None:
    """A run of one process, in this one."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(launch(armed_worker, (options, kill), 1, device_type="cpu"))


def run_alone(options: Options, kill: Kill | None = None) -> int:
    """The exit code; the output is in the file beside the run's folder."""
    process = quick_start().Process(target=alone, args=(options, kill, f"{options.run_dir}.log"))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode


def run_two(options: Options, kill: Kill | None = None) -> int:
    quick_start()
    before, launching.START_METHOD = launching.START_METHOD, "forkserver"
    try:
        return launch(armed_worker, (options, kill), 2, 0, device_type="cpu")
    finally:
        launching.START_METHOD = before


def log_of(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def records(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the machine decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in MEASURED and not name.startswith("peak_")}
        for line in lines
    ]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in MEASURED]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same_run(run: Path, expected: Path) -> None:
    stores = [CheckpointStore(each / "checkpoints", read_only=True) for each in (run, expected)]
    for mine, other in ([s.load_newest() for s in stores], [s.load_best() for s in stores]):
        assert mine is not None and other is not None and mine.position == other.position
        assert mine.tensors.keys() == other.tensors.keys()
        assert any(name.startswith("optimizer.") for name in mine.tensors)
        assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)
    assert records(run) == records(expected)
    assert scalars(run) == scalars(expected)
    assert (run / "resolved.gin").read_text() == (expected / "resolved.gin").read_text()


def assert_nothing_lost(run: Path, reached: int) -> int:
    """Every checkpoint that shows is whole, and the newest is not before ``reached``; returns its step."""
    store = CheckpointStore(run / "checkpoints", read_only=True)
    steps = [store.load(path).position.step for path in store.paths()]
    assert steps == sorted(steps) and max(steps, default=0) >= reached
    for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []:
        json.loads(line)
    return max(steps, default=0)


def kills(generator: random.Random, world_size: int) -> Iterator[Kill]:
    """Each kind of moment in turn, at a random call of it."""
    while True:
        for function, calls in generator.sample(list(MOMENTS.items()), len(MOMENTS)):
            rank = generator.randrange(world_size)
            yield Kill(function, generator.randint(1, calls), generator.random() < 0.5, rank)


def run_with_kills(
    start: Callable[[Options, Kill | None], int],
    data_root: Path,
    folder: Path,
    expected: Path,
    count: int,
    world: int,
) -> None:
    """Kills runs ``count`` times in all, at most 4 times each; then each resumes to its end."""
    moments = kills(random.Random(3), world)
    struck, number = 0, 0
    while struck < count:
        run, reached, number = folder / f"run{number}", 0, number + 1
        for _ in range(4):
            code = start(options_of(data_root, run), next(moments))
            assert code in (0, 1 if world > 1 else -signal.SIGKILL)
            struck += code != 0
            reached = assert_nothing_lost(run, reached)
            if code == 0 or struck == count:
                break
        if code != 0:
            assert start(options_of(data_root, run), None) == 0
        assert_same_run(run, expected)
        shutil.rmtree(run)
