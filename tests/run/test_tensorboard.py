"""TensorBoard's events of a run: the course of its steps, its result and its hyperparameters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from generative_recommenders.config.gin import resolved_values
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings

CHOICES = {"num_epochs": 2, "local_batch_size": 16, "eval_interval": 3, "num_warmup_steps": 5,
"sampling_strategy": "local",
           "num_negatives": 4}  # fmt: skip


def test_events_of_a_run_can_be_read_back(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    chosen = settings(**CHOICES, learning_rate=0.01)
    split = make_split(ragged_dataset, "leave_one_out")
    with RunFolder.create_or_open(tmp_path / "run") as run:
        log = EpochLog.of(run, chosen)
        trainer = Trainer(chosen, ragged_dataset, split, Collectives(torch.device("cpu")), log)
        result = trainer.train()
        test = {f"test/{name}": value for name, value in result.metrics().items()}
        run.write_result(trainer.progress.step, test, resolved_values(chosen))
    events = EventAccumulator(str(run.tensorboard)).Reload()
    steps = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
        recorded = steps[f"train/{tag}"]
        assert [event.step for event in recorded] == list(range(3, trainer.progress.step + 1, 3)), tag
        assert all(event.value > 0 for event in recorded), tag
    rates = [event.value for event in steps["train/learning_rate"]]
    assert rates[0] == pytest.approx(0.01 * 3 / 5) and rates[1] == pytest.approx(0.01)
    assert [(event.step, event.value) for event in steps["test/ndcg@10"]] == [
        (trainer.progress.step + 1, pytest.approx(result.metrics()["ndcg@10"]))
    ]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugin.plugin_name == "hparams"
    content = plugin.content.decode("latin-1")
    assert "train_fn.learning_rate" in content and "sasrec_encoder.num_heads" in content
    assert trainer.log.spent.keys() == {"waiting for batches", "evaluation", "test"}


def test_the_gradient_norm_is_that_of_all_gradients_before_clipping(ragged_dataset: SequenceDataset) -> None:
    norms = []
    for optimizer, clipped in (("adamw", None), ("adamw", 1e-3), ("rowwise_adagrad", 1e-3)):
        chosen = settings(**{**CHOICES, "optimizer": optimizer, "max_grad_norm": clipped, "eval_interval": 1})
        split = make_split(ragged_dataset, "leave_one_out")
        trainer = Trainer(chosen, ragged_dataset, split, Collectives(torch.device("cpu")))
        found = trainer.run_step(next(trainer.loader.epoch(0))).gradient_norm
        assert found is not None
        norms.append(float(found))
        if clipped is None:
            gradients = [p.grad for p in trainer.task.parameters() if p.grad is not None]
            assert norms[0] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
    assert norms == pytest.approx([norms[0]] * 3)


def test_steps_between_records_measure_no_norm(ragged_dataset: SequenceDataset) -> None:
    chosen = settings(**CHOICES)
    split = make_split(ragged_dataset, "leave_one_out")
    trainer = Trainer(chosen, ragged_dataset, split, Collectives(torch.device("cpu")))
    measured = [trainer.run_step(batch).gradient_norm is not None for batch in trainer.loader.epoch(0)]
    assert measured == [(step + 1) % 3 == 0 for step in range(len(measured))]


def test_the_time_spent_continues_in_a_resumed_run() -> None:
    log = EpochLog.of(None, settings())
    with log.timed("evaluation"):
        pass
    again = EpochLog.of(None, settings())
    again.restore(json.loads(json.dumps(log.state())))
    assert again.spent == log.spent and again.spent["evaluation"] > 0
