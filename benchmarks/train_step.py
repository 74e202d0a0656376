"""Seconds of one training step, of its data, and memory; the last line is JSON.

    python benchmarks/train_step.py --encoder=SASRec --profile=ml-1m --negatives_sharing=block --steps=30

matmul_gflops is the speed of a plain matrix product on the same device before and after the steps: where two runs
differ in it, the machine did. ``--plain_steps=3`` then times a SASRec written the usual way (`plain_step.py`) on the
same batches. Without ``--prepared=DIR`` it makes sequences with timestamps: ``--profile=ml-1m`` with ML-1M's
distribution of lengths (mean 165, median 95, longest 2276) over 3,706 items, ``--profile=amzn-books`` with 9 events a
user, of which 7 are for training, over 801,350 items, most of them in nobody's history. ``--num_items`` makes another
catalogue. products_seconds is what the matrix products of a step take alone (`floors.py`), bytes_seconds what its reads
and writes of the item table take at the rate of a copy: each row once in and once out, of AdamW's two moments as well.
``--evaluations=3`` then times the exact ranks of all validation targets, encoding included, and their products alone.
``--gin_config_file`` times a configuration as it is, on sequences of the profile; bindings alone change it.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import floors
import numpy as np
import plain_step
import pyarrow as pa
import pyarrow.csv
import records
import timing
import torch
from absl import app, flags
from made_data import movie_lengths, zipf_items

from generative_recommenders.build import factories  # noqa: F401  (registers the encoders)
from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.objectives.negative_samplers import SHARINGS
from generative_recommenders.training.trainer import Trainer

SIZES = {
    "HSTU": ["dqk = 50", "dv = 50", "linear_dropout_rate = 0.2"],
    "HSTU-large": ["num_blocks = 8", "num_heads = 2", "dqk = 25", "dv = 25", "linear_dropout_rate = 0.2"],
    "FuXi": ["dqk = 50", "dv = 50", "linear_dropout_rate = 0.2"],
}
"""Options of encoders as their published ML-1M configurations have them."""
CONFIGS = {
    "ml-1m": {"": "configs/ml-1m/sasrec-sampled-softmax-n128.gin"},
    "amzn-books": {
        "": "configs/amzn-books/sasrec-sampled-softmax-n512-final.gin",
        "HSTU": "configs/amzn-books/hstu-sampled-softmax-n512-final.gin",
        "HSTU-large": "configs/amzn-books/hstu-sampled-softmax-n512-large-final.gin",
        "TwoTower": "configs/amzn-books/two-tower.gin",
        "DiffTransformer": "configs/amzn-books/diff-transformer.gin",
    },
}
"""The configuration of each profile, and of encoders that have their own."""
NUM_ITEMS = {"ml-1m": 3706, "amzn-books": 801_350}

_ENCODER = flags.DEFINE_enum("encoder", "SASRec", sorted({*ENCODERS.names(), *SIZES}), "which encoder")
_PROFILE = flags.DEFINE_enum("profile", "ml-1m", sorted(CONFIGS), "whose configuration and lengths")
_SHARING = flags.DEFINE_enum("negatives_sharing", "position", list(SHARINGS), "who shares negatives")
_LOSS = flags.DEFINE_string("loss", None, "a loss by name instead of the configuration's")
_USERS = flags.DEFINE_integer("users", None, "users of made data, instead of the profile's number", lower_bound=30)
_ITEMS = flags.DEFINE_integer("num_items", None, "items of the catalogue; the profile's own otherwise")
_BATCH = flags.DEFINE_integer("batch_size", 128, "users of a step", lower_bound=1)
_BLOCK = flags.DEFINE_integer("negatives_block_size", 256, "positions of a block", lower_bound=1)
_NEGATIVES = flags.DEFINE_integer(
    "num_negatives", None, "negatives a position, block or batch: 128, of amzn-books 512", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 30, "timed steps", lower_bound=1)
_PREPARED = flags.DEFINE_string("prepared", None, "a prepared data set instead of made sequences")
_THREADS = flags.DEFINE_integer("threads", 0, "torch threads; 0 for torch's own choice", lower_bound=0)
_PLAIN_STEPS = flags.DEFINE_integer("plain_steps", 0, "steps of a plain SASRec, on the CPU", lower_bound=0)
_EVALUATIONS = flags.DEFINE_integer("evaluations", 0, "evaluations to time", lower_bound=0)
_CONFIG = flags.DEFINE_string("gin_config_file", None, "a configuration as it is, on the profile's sequences")
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "further bindings")


def made_dataset(folder: Path, num_users: int, num_items: int, profile: str) -> SequenceDataset:
    """Zipf items, seconds between events, ratings from 1 to 5; written as CSV and prepared like any other data set,
    with the items that nobody has rated after the others.
    """
    generator = np.random.default_rng(0)
    lengths = movie_lengths(num_users, generator) if profile == "ml-1m" else 4 + generator.geometric(0.2, num_users)
    users = np.repeat(np.arange(num_users), lengths)
    items = zipf_items(users.size, num_items, generator)
    times = 10**9 + np.cumsum(generator.integers(1, 3600, users.size))
    ratings = generator.integers(1, 6, users.size)
    table = pa.table({"user": users, "item": items, "rating": ratings, "timestamp": times})
    pa.csv.write_csv(table, folder / "events.csv", pa.csv.WriteOptions(include_header=False))
    options = ReadOptions("user,item,rating,timestamp", ",", header=False)
    raw = RawRatings(name="made", files=[folder / "events.csv"], options=options)
    prepare(raw, folder / "prepared")
    dataset = SequenceDataset.open(folder / "prepared")
    return replace(dataset, unrated=num_items - dataset.num_items)


def num_negatives() -> int:
    return _NEGATIVES.value or (512 if _PROFILE.value == "amzn-books" else 128)


def make_trainer(dataset: SequenceDataset) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = load_settings()
    return Trainer(settings, dataset, make_split(dataset, "leave_one_out"), Collectives(device))


def load_settings() -> RunSettings:
    if _CONFIG.value is not None:
        choices = (_ENCODER, _SHARING, _LOSS, _BATCH, _BLOCK, _NEGATIVES)
        if given := [f"--{each.name}" for each in choices if each.present]:
            sys.exit(f"{', '.join(given)}: not beside --gin_config_file; bind settings by --gin_bindings")
        return gin_registry.load_settings([Path(_CONFIG.value)], _BINDINGS.value)
    module = _ENCODER.value.removesuffix("-large")
    profile, own = _PROFILE.value, []
    if _ENCODER.value not in CONFIGS[profile]:
        own = [f"{ENCODERS[module].gin_name}.{option}" for option in SIZES.get(_ENCODER.value, [])]
    if _LOSS.value is not None:
        own.append(f"train_fn.loss_module = '{_LOSS.value}'")
    bindings = [
        f"train_fn.main_module = '{module}'",
        f"train_fn.negatives_sharing = '{_SHARING.value}'",
        f"train_fn.negatives_block_size = {_BLOCK.value}",
        f"train_fn.num_negatives = {num_negatives()}",
        f"train_fn.local_batch_size = {_BATCH.value}",
        *own,
        *_BINDINGS.value,
    ]
    config = CONFIGS[profile].get(_ENCODER.value, CONFIGS[profile][""])
    return gin_registry.load_settings([records.ROOT / config], bindings)


def timed_steps(trainer: Trainer, steps: int, warmup: int = 3) -> list[tuple[float, float, int]]:
    """(seconds of the step, seconds waiting for its data, tokens) of each timed step."""
    rows: list[tuple[float, float, int]] = []
    trainer.model.train()
    batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
    for _ in range(warmup + steps):
        started = time.perf_counter()
        loaded = next(batches)
        ready = time.perf_counter()
        float(trainer.run_step(loaded).loss)  # waits for an accelerator
        rows.append((time.perf_counter() - started, ready - started, loaded.global_tokens))
    return rows[warmup:]


def timed_plain_steps(trainer: Trainer, steps: int) -> list[float]:
    """Seconds of steps of `plain_step.PlainStep` on the trainer's batches; a step before them is not counted."""
    plain = plain_step.PlainStep(trainer.settings, trainer.dataset.num_items)
    seconds = []
    for loaded in itertools.islice(trainer.loader.epoch(0), steps + 1):
        example = trainer.task.objective.example(loaded.columns)
        seconds += timing.seconds_of(partial(plain, example), 1, warmup=0)
    return seconds[1:]


def matmul_gflops(device: torch.device, size: int = 1024, repeats: int = 10) -> float:
    """Billions of operations a second of a square float32 product, the median of some."""
    x = torch.randn(size, size, device=device)
    seconds = timing.seconds_of(lambda: x @ x, repeats, warmup=0)
    return round(2 * size**3 / statistics.median(seconds) / 1e9, 1)


def table_bytes(trainer: Trainer, batch: LoadedBatch) -> int:
    """Bytes of the item table and its moments that a step has to read and to write."""
    table, optimizer = trainer.model.items.table, trainer.settings.value("train_fn.optimizer")
    rows = trainer.task.prepare(batch, 0).row_ids
    read = len(table) if rows is None or optimizer == "adamw" else len(rows)
    arrays = 1 if optimizer == "rowwise_adagrad" else 3
    return 2 * arrays * read * table.shape[1] * table.element_size()


def run(dataset: SequenceDataset) -> dict[str, object]:
    trainer = make_trainer(dataset)
    before = matmul_gflops(trainer.collectives.device)
    rows = timed_steps(trainer, _STEPS.value)
    seconds, data, tokens = (list(column) for column in zip(*rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    value = trainer.settings.value
    sharing = value("train_fn.negatives_sharing")
    result: dict[str, Any] = {
        "encoder": value("train_fn.main_module") if _CONFIG.value else _ENCODER.value,
        "gin_config_file": _CONFIG.value,
        "profile": _PROFILE.value,
        "prepared": _PREPARED.value or "made",
        "negatives_sharing": sharing,
        "negatives_block_size": value("train_fn.negatives_block_size") if sharing == "block" else None,
        "optimizer": value("train_fn.optimizer"),
        "loss": value("train_fn.loss_module"),
        "num_negatives": value("train_fn.num_negatives"),
        "num_items": dataset.num_items,
        "batch_size": value("train_fn.local_batch_size"),
        "steps": len(rows),
        "threads": torch.get_num_threads(),
        "device": str(trainer.collectives.device),
        "step_seconds": round(statistics.median(seconds), 5),
        "step_seconds_min": round(min(seconds), 5),
        "tokens_per_second": round(sum(tokens) / sum(seconds)),
        "data_seconds": round(statistics.median(data), 5),
        "peak_rss_mb": round(peak),
        "matmul_gflops": [before, matmul_gflops(trainer.collectives.device)],
    }
    if trainer.collectives.device.type == "cpu":
        example = next(iter(trainer.loader.epoch(0)))
        products = floors.products_of(lambda: trainer.run_step(example))
        result |= {"products_seconds": products["seconds"], "products_gflop": products["gflop"]}
        result["copied_gb_a_second"] = floors.copied_gb_a_second()
        result["bytes_seconds"] = round(table_bytes(trainer, example) / 1e9 / result["copied_gb_a_second"], 6)
    if trainer.collectives.device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    if _PLAIN_STEPS.value:
        plain = timed_plain_steps(trainer, _PLAIN_STEPS.value)
        result["plain_step_seconds"] = round(statistics.median(plain), 5)
    if _EVALUATIONS.value:
        result |= timed_evaluations(trainer, _EVALUATIONS.value)
    return result


def timed_evaluations(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """The median of some evaluations; one before them is not counted."""

    def evaluate() -> int:
        return trainer.evaluation.validation(trainer.model).targets

    users = evaluate()
    return {
        "evaluation_users": users,
        "evaluation_seconds": round(statistics.median(timing.seconds_of(evaluate, repeats, warmup=0)), 4),
        "evaluation_products_seconds": floors.products_of(evaluate)["seconds"],
    }


def main(argv: list[str]) -> None:
    keep_freed_memory()
    if _THREADS.value:
        torch.set_num_threads(_THREADS.value)
    if _PREPARED.value is not None:
        records.finish(run(SequenceDataset.open(_PREPARED.value)))
        return
    with tempfile.TemporaryDirectory() as folder:
        items = _ITEMS.value or NUM_ITEMS[_PROFILE.value]
        users = _USERS.value or (6040 if _PROFILE.value == "ml-1m" else 12_000)
        records.finish(run(made_dataset(Path(folder), users, items, _PROFILE.value)))


if __name__ == "__main__":
    app.run(main)
