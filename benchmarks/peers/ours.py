"""This program's trainer and evaluator, started by `compare_peers.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import floors
from common import Clock, arguments, peak_rss_mb

from generative_recommenders.config import gin as gin_registry
from generative_recommenders.data.loader import prefetch
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.training.trainer import Trainer

BLOCKS = {
    "SASRec": "sasrec_encoder",
    "TwoTower": "sasrec_encoder",
    "DiffTransformer": "diff_transformer_encoder",
    "HSTU": "hstu_encoder",
}
"""The gin name of each encoder's blocks."""


def main() -> None:
    flags = arguments()
    clock = Clock(flags.started)
    imported = peak_rss_mb()
    keep_freed_memory()
    bindings = [
        f"train_fn.main_module = '{flags.encoder}'",
        "train_fn.loss_module = 'CE'",
        f"train_fn.local_batch_size = {flags.batch}",
        f"train_fn.max_sequence_length = {flags.length}",
        f"train_fn.item_embedding_dim = {flags.width}",
        "train_fn.dropout_rate = 0.2",
        "train_fn.item_l2_norm = False",
        f"{BLOCKS[flags.encoder]}.num_heads = 1",
        f"{BLOCKS[flags.encoder]}.num_blocks = {flags.blocks}",
    ]
    settings = gin_registry.load_settings([], bindings)
    dataset = SequenceDataset.open(flags.folder / "prepared" / "ours")
    trainer = Trainer(settings, dataset, make_split(dataset, "leave_one_out"), Collectives("cpu"))
    trainer.model.train()
    for number in range(2):
        clock.begin_epoch()
        for batch in prefetch(trainer.loader.epoch(number), 4):
            float(trainer.run_step(batch).loss)
            clock.step()
        clock.end_epoch()
    trainer.model.eval()
    begun = time.perf_counter()
    trainer.evaluation.test(trainer.model)
    figures = {"evaluation": time.perf_counter() - begun, "peak_rss_mb": peak_rss_mb()}
    # AdamW holds a gradient and two moments beside each weight.
    state = 4 * sum(each.nbytes for each in trainer.model.parameters())
    clock.report(
        evaluation_floor=floors.products_of(lambda: trainer.evaluation.test(trainer.model))["seconds"],
        peak_rss_mb_floor=imported + round(state / 2**20),
        **figures,
    )


if __name__ == "__main__":
    main()
