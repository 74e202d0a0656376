"""Memory and time of training, evaluation and checkpoints over a large catalogue; the last line is JSON.

    python benchmarks/large_catalogue.py --items=10000000
    python benchmarks/large_catalogue.py --items=10000000 --processes=2 --optimizer=lazy_adamw

SASRec of 4 blocks over made histories of Amazon Books' lengths (mean about 7, at most 50), 512 negatives a block of 64
positions, 128 users a step in all. With several processes the item table is sharded over them. peak_mb is the most that
the processes have held together up to the end of each stage, in MiB; the table alone takes table_mb.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from made_data import dataset_of

from generative_recommenders.checkpoint.broadcast import checkpoint_from_main
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.launch import launch
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.distributed.process_group import process_collectives, process_device
from generative_recommenders.training.trainer import Trainer

MEAN_LENGTH, LONGEST, WARM_UP = 7, 50, 2


def made_dataset(users: int, num_items: int) -> SequenceDataset:
    """Histories of items drawn from the whole catalogue, most of which nobody has."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(5 + generator.geometric(1 / (MEAN_LENGTH - 4), users), LONGEST)
    items = generator.integers(1, num_items + 1, lengths.sum(), dtype=np.int32)
    return dataset_of(lengths, items, num_items, generator)


def worker(rank: int, world_size: int, args: argparse.Namespace, folder: str) -> int:
    keep_freed_memory()
    collectives = process_collectives(process_device())
    dataset = made_dataset(args.users, args.items)
    settings = RunSettings().bind({
        "train_fn.max_sequence_length": LONGEST, "train_fn.item_embedding_dim": args.dim,
        "train_fn.optimizer": args.optimizer, "train_fn.local_batch_size": args.batch_size // world_size,
        "train_fn.sampling_strategy": "local", "train_fn.negatives_sharing": "block",
        "train_fn.negatives_block_size": 64, "train_fn.num_negatives": 512,
        "train_fn.item_table": "sharded" if world_size > 1 else "replicated", "sasrec_encoder.num_blocks": 4,
        "sasrec_encoder.ffn_hidden_dim": args.dim, "train_fn.eval_users": args.eval_users,
    })  # fmt: skip
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {"imports": peak(collectives.sum_scalar)}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 3)
        peaks[name] = peak(collectives.sum_scalar)
        return result

    trainer = stage("build", lambda: Trainer(settings, dataset, make_split(dataset), collectives))
    trainer.model.train()

    def train() -> list[float]:
        times = []
        batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
        for batch in itertools.islice(batches, WARM_UP + args.steps):
            started = time.perf_counter()
            trainer.run_step(batch)
            times.append(time.perf_counter() - started)
        return times[WARM_UP:]

    step_seconds = stage("steps", train)
    users = stage("evaluation", lambda: trainer.evaluation.test(trainer.model)).targets
    checkpoints = Path(folder) / "checkpoints"
    store = CheckpointStore(checkpoints, read_only=not collectives.is_main, joins_rows=world_size == 1)
    if args.checkpoint:
        stage("checkpoint", lambda: trainer.save(store))

        def resume() -> None:
            checkpoint = checkpoint_from_main(collectives, store.load_newest)
            assert checkpoint is not None
            trainer.restore(checkpoint)

        stage("resume", resume)
    if collectives.is_main:
        result = {
            "items": args.items, "dim": args.dim, "processes": world_size, "optimizer": args.optimizer,
            "table_mb": round(4 * args.items * args.dim / 2**20),
            "step_seconds": round(statistics.median(step_seconds), 4),
            "eval_users_per_second": round(users / seconds["evaluation"], 1), "threads": torch.get_num_threads(),
            "seconds": seconds, "peak_mb": peaks,
        }  # fmt: skip
        (Path(folder) / "result.json").write_text(json.dumps(result))
    return 0


def peak(total: Callable[[float], float]) -> int:
    """Largest resident memory of all processes together so far, in MiB."""
    return round(total(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> int:
    parser = records.parser_of(
        __doc__, items=2_000_000, dim=64, processes=1, batch_size=128, steps=20, users=20_000, eval_users=1024
    )
    parser.add_argument("--optimizer", default="rowwise_adagrad")
    parser.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, default=True, help="also save and resume"
    )
    parser.add_argument("--folder", default=None, help="where checkpoints are written; a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        code = launch(worker, (args, folder), args.processes, 0, device_type="cpu")
        if code == 0:
            records.finish(json.loads((Path(folder) / "result.json").read_text()))
    return code


if __name__ == "__main__":
    sys.exit(main())
