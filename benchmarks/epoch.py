"""One epoch end to end: `main.py` in a process of its own, from its start to the metrics of the test; the last line is
JSON.

    python benchmarks/epoch.py --profile=ml-1m                         # 600 users of ML-1M's lengths, under a minute
    python benchmarks/epoch.py --profile=amzn-books --users=969656 --gin_bindings="train_fn.negatives_sharing='block'"
    python benchmarks/epoch.py --profile=amzn-books --prepared=data/prepared/synthetic-books

seconds: the whole process. training_seconds: the epoch alone, and tokens_per_second those of its histories in that
time; products_seconds: what the matrix products of its steps take alone, by those of three batches. The rest of the
process's time is start-up, two evaluations (validation, test), baselines and the checkpoint. Data and configuration are
those of `train_step.py`, but for the catalogue: here it is of the rated items alone, `items` of them.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import floors
import numpy as np
import records
import torch
import train_step
from absl import app, flags

from generative_recommenders.config import gin as gin_registry
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.trainer import Trainer

USERS = {"ml-1m": 600, "amzn-books": 3000}
"""Of made data, unless ``--users`` says how many."""
SHARED = {"profile", "prepared", "users", "num_items", "gin_bindings"}
"""Flags of `train_step` that count here, too."""


def run(prepared: Path, folder: Path) -> dict[str, object]:
    config = records.ROOT / train_step.CONFIGS[flags.FLAGS.profile][""]
    bindings = [
        f"train_fn.dataset_name = '{prepared.name}'",
        "train_fn.num_epochs = 1",
        *flags.FLAGS.gin_bindings,
    ]
    command = [
        sys.executable, str(records.ROOT / "main.py"), f"--gin_config_file={config}", "--num_processes=1",
        "--noreport",
        f"--data_root={prepared.parents[1]}", f"--run_dir={folder / 'run'}",
        *(f"--gin_bindings={each}" for each in bindings),
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    spent = os.times()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    training = max(line["seconds"] for line in lines if "seconds" in line)
    dataset = SequenceDataset.open(prepared)
    settings = gin_registry.load_settings([config], bindings)
    split = make_split(dataset, "leave_one_out")
    tokens = int(np.minimum(split.train_stops, settings.data.max_sequence_length).sum())
    trainer = Trainer(settings, dataset, split, Collectives(torch.device("cpu")))
    batches = list(itertools.islice(trainer.loader.epoch(0), 3))
    products = [floors.products_of(partial(trainer.run_step, batch))["seconds"] for batch in batches]
    return {
        "profile": flags.FLAGS.profile,
        "prepared": flags.FLAGS.prepared or "made",
        "users": dataset.num_users,
        "items": dataset.num_items,
        "gin_bindings": flags.FLAGS.gin_bindings,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(os.getloadavg()[0], 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(spent.children_user + spent.children_system, 2),
        "training_seconds": round(training, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / training),
        "products_seconds": round(statistics.mean(products) * len(trainer.loader), 3),
        "peak_rss_mb": lines[-1]["peak_rss_mb"],
    }


def main(argv: list[str]) -> None:
    others = [flag for flag in flags.FLAGS.get_flags_for_module(train_step) if flag.name not in SHARED]
    if given := [f"--{flag.name}" for flag in others if flag.present]:
        sys.exit(f"{', '.join(given)}: of train_step.py alone; bind settings by --gin_bindings")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if flags.FLAGS.prepared is not None:
            records.finish(run(Path(flags.FLAGS.prepared).resolve(), folder))
            return
        profile = flags.FLAGS.profile
        items = flags.FLAGS.num_items or train_step.NUM_ITEMS[profile]
        made = folder / "prepared"
        made.mkdir()
        train_step.made_dataset(made, flags.FLAGS.users or USERS[profile], items, profile)
        records.finish(run(made / "prepared", folder))


if __name__ == "__main__":
    app.run(main)
