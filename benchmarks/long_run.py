"""Memory of a long training run: resident megabytes at intervals over many steps; the last line is JSON.

    python benchmarks/long_run.py --steps=10000 --result=benchmarks/results/long_run.json

A small SASRec on random sequences, with everything that a real run does between steps: epochs, prefetched batches,
evaluations, metrics, TensorBoard, checkpoints. The first fifth of the steps is warm-up; growth is what a straight line
through the rest gains from its beginning to its end.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import records
import torch
from absl import app, flags, logging
from made_data import dataset_of

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.training.trainer import Trainer

USERS, ITEMS, EVENTS_EACH = 640, 500, 30
SETTINGS = RunSettings().bind({
    "train_fn.dataset_name": "random", "train_fn.max_sequence_length": 20, "train_fn.local_batch_size": 32,
    "train_fn.item_embedding_dim": 16, "train_fn.sampling_strategy": "local", "train_fn.num_negatives": 16,
    "train_fn.num_epochs": 1_000_000, "train_fn.eval_interval": 100, "train_fn.save_ckpt_every_n": 25,
    "train_fn.full_eval_every_n": 25, "train_fn.partial_eval_num_iters": 2, "sasrec_encoder.ffn_hidden_dim": 16,
})  # fmt: skip

_STEPS = flags.DEFINE_integer("steps", 10_000, "optimizer steps", lower_bound=100)
_SAMPLES = flags.DEFINE_integer("samples", 100, "how often memory is looked at", lower_bound=10)
_RESULT = flags.DEFINE_string("result", None, "where the JSON line is written too")


def resident_over_a_run(folder: Path, steps: int, samples: int) -> tuple[list[int], list[float]]:
    """Steps, and resident megabytes after them."""
    generator = np.random.default_rng(0)
    lengths = np.full(USERS, EVENTS_EACH)
    dataset = dataset_of(lengths, generator.integers(1, ITEMS + 1, lengths.sum()), ITEMS, generator)
    at: list[int] = []
    resident: list[float] = []
    with RunFolder.create_or_open(folder / "run") as run:
        trainer = Trainer(SETTINGS, dataset, make_split(dataset), Collectives("cpu"), EpochLog.of(run, SETTINGS))

        def look() -> None:
            if trainer.progress.step % max(1, steps // samples) == 0:
                at.append(trainer.progress.step)
                resident.append(records.resident_bytes() / 2**20)

        trainer.train(CheckpointStore(folder / "run" / "checkpoints"), steps, on_step=look)
    return at, resident


def main(argv: list[str]) -> None:
    """Print one JSON object."""
    logging.set_verbosity(logging.ERROR)
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        at, resident = resident_over_a_run(Path(folder), _STEPS.value, _SAMPLES.value)
    settled = slice(len(at) // 5, None)
    slope = np.polyfit(at[settled], resident[settled], 1)[0]
    result = {
        "steps": _STEPS.value,
        "seconds": round(time.perf_counter() - started, 1),
        "growth_mb": round(float(slope) * (at[-1] - at[settled][0]), 2),
        "first_settled_mb": round(resident[settled][0], 1),
        "last_mb": round(resident[-1], 1),
        "highest_mb": round(max(resident), 1),
        "resident_mb": [round(each, 1) for each in resident[:: max(1, len(resident) // 20)]],
    }
    records.finish(result, _RESULT.value and Path(_RESULT.value))


if __name__ == "__main__":
    app.run(main)
