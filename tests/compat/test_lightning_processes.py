# ruff: noqa: E402 - what needs the extra is imported after the check for it
"""Lightning's trainer over two processes; needs the extra ``lightning``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

lightning = pytest.importorskip("lightning")

from generative_recommenders.build.parts import build_task
from generative_recommenders.compat.replay.nn.lightning.postprocessor import SeenItemsFilter
from generative_recommenders.lightning import ComputeMetricsCallback, DataModule, LightningModule, OptimizerFactory
from programs import quick_start
from tiny_data import ragged_sequences, tiny_dataset
from tiny_models import settings

NUM_ITEMS = 30


def fit(folder: str, devices: int, result: Path) -> None:
    """Trains an epoch of global batches of 16, and writes the metrics of its end."""
    run = settings(
        dataset_name="tiny", max_sequence_length=10, local_batch_size=16 // devices, num_epochs=1, learning_rate=1e-2,
        num_warmup_steps=0, loss_module="CE",
    )  # fmt: skip
    lightning.seed_everything(1, verbose=False)
    data = DataModule(Path(folder), run)
    module = LightningModule(build_task(run, data.catalogue()), OptimizerFactory("adamw", 1e-2))
    metrics = ComputeMetricsCallback(["ndcg", "recall"], [5], [SeenItemsFilter(NUM_ITEMS + 1)], NUM_ITEMS)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[metrics],
    )  # fmt: skip
    trainer.fit(module, data)
    result.write_text(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))


def test_two_processes_give_the_loss_and_the_metrics_of_one(tmp_path: Path) -> None:
    folder = str(tiny_dataset(tmp_path, ragged_sequences(57, NUM_ITEMS, seed=5)).folder)
    fit(folder, 1, tmp_path / "one")
    # From a process of its own, which has no threads when it forks its members.
    process = quick_start().Process(target=fit, args=(folder, 2, tmp_path / "two"))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in ("train_loss_epoch", "ndcg@5", "recall@5"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
