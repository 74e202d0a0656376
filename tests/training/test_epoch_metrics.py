"""Metrics that each epoch records: exact ranks, highly rated targets, metrics of top-k lists."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.run.summary import COLUMNS, curve_rows
from generative_recommenders.training.trainer import Trainer
from tiny_data import ragged_sequences, tiny_dataset
from tiny_models import settings

HIGH_RATED = [f"high_rated_{name}@{k}" for k in (1, 10, 50, 100, 200, 500) for name in ("hr", "ndcg")] + [
    "high_rated_mrr"
]
LISTS = [f"{name}@7" for name in ("recall", "precision", "map", "novelty", "coverage", "diversity")]


def make_trainer(dataset: SequenceDataset, run: RunFolder | None = None, **choices: Any) -> Trainer:
    chosen = settings(num_epochs=3, local_batch_size=16, eval_batch_size=8, **choices)
    return Trainer(
        chosen,
        dataset,
        make_split(dataset, chosen.data.protocol),
        Collectives(),
        EpochLog.of(run, chosen),
    )


def recorded(dataset: SequenceDataset, folder: Path, **choices: Any) -> tuple[list[dict], set[str], Trainer]:
    """The epochs' lines of metrics.jsonl, TensorBoard's names, and the trainer after its run."""
    with RunFolder.create_or_open(folder, False) as run:
        trainer = make_trainer(dataset, run, **choices)
        trainer.train()
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    tags = set(EventAccumulator(str(run.tensorboard)).Reload().Tags()["scalars"])
    return [line for line in lines if "train_loss" in line], tags, trainer


def test_the_speed_of_a_resumed_run_leaves_out_what_came_before() -> None:
    written: dict[str, float] = {}
    run = SimpleNamespace(write_scalars=lambda *_: None, write_metrics=lambda _, values: written.update(values))
    log = EpochLog(run, 9, "validation")
    log.begin(10, 100, 3600.0)
    for _ in log.watch([SimpleNamespace(global_tokens=80)], 1, 0, 0):
        pass
    log.step(11, SimpleNamespace(loss=1.0, learning_rate=0.1, gradient_norm=None), 3604.0, {})
    assert written["train/tokens_per_second"] == 20


@pytest.mark.parametrize(("protocol", "part"), [("leave_one_out", "validation"), ("paper", "test")])
def test_full_evaluations_record_high_rated_targets_and_lists(
    ragged_dataset: SequenceDataset, tmp_path: Path, protocol: str, part: str
) -> None:
    lines, tags, trainer = recorded(ragged_dataset, tmp_path / "run", protocol=protocol, list_metrics_k=7)
    assert [line["part"] for line in lines] == [part] * 3
    for line in lines:
        assert set(HIGH_RATED + LISTS) <= set(line)
    assert {f"{part}/{name}" for name in HIGH_RATED + LISTS} <= tags
    result = trainer.evaluation.validation(trainer.model)
    last = lines[-1]
    assert {name: last[f"high_rated_{name}"] for name in result.high_rated_metrics()} == result.high_rated_metrics()
    assert {name: last[name] for name in result.lists} == result.lists
    assert {name: last[name] for name in result.metrics()} == result.metrics()
    assert last["high_rated_hr@10"] != last["hr@10"]


def test_the_threshold_is_the_setting(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    (line, *_), _, _ = recorded(ragged_dataset, tmp_path / "run", rating_threshold=1.0)
    assert line["high_rated_ndcg@10"] == line["ndcg@10"]


def test_partial_evaluations_record_ranks_alone(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    choices = {"full_eval_every_n": 2, "partial_eval_num_iters": 1, "list_metrics_k": 7}
    lines, _, _ = recorded(ragged_dataset, tmp_path / "run", **choices)
    assert [line["full"] for line in lines] == [True, False, True]
    assert ["high_rated_mrr" in line and "recall@7" in line for line in lines] == [True, False, True]
    assert not any(name.startswith("high_rated_") or "recall" in name for name in lines[1])
    assert "hr@10" in lines[1]
    assert ["ndcg@10_standard_error" in line for line in lines] == [False, True, False]


def test_without_ratings_and_lists_nothing_is_added(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(57, 30, seed=5), ratings=False)
    lines, tags, _ = recorded(dataset, tmp_path / "run")
    assert not any("high_rated" in name or "recall" in name for name in {*lines[0], *tags})


def test_lists_at_a_cutoff_of_the_ranks_leave_their_names_alone(ragged_dataset: SequenceDataset) -> None:
    trainer = make_trainer(ragged_dataset, list_metrics_k=10)
    result = trainer.evaluation.validation(trainer.model)
    every, ranks = result.all_metrics(), result.metrics()
    assert {name: every[name] for name in ranks} == ranks
    assert every["hr@10"] == pytest.approx(result.lists["hr@10"])
    assert [*every][: len(ranks)] == [*ranks]


def test_the_best_epoch_is_chosen_as_without_them(ragged_dataset: SequenceDataset) -> None:
    plain, more = (make_trainer(ragged_dataset, list_metrics_k=k) for k in (None, 10))
    for trainer in (plain, more):
        trainer.train()
    assert more.progress.best_epoch == plain.progress.best_epoch
    assert more.progress.best_metric == plain.progress.best_metric


def test_curves_show_the_loss_and_the_columns_of_the_table() -> None:
    ranks = dict.fromkeys(COLUMNS, 0.5)
    epoch = {"epoch": 0, "train_loss": 2.0, "seconds": 80.0, "full": True, "popularity_bias@7": 3.0, **ranks}
    assert curve_rows([epoch]) == [{"epoch": 1, "train_loss": 2.0, **ranks}]


def test_a_resumed_run_records_the_same(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    whole, first, second = (make_trainer(ragged_dataset, list_metrics_k=7) for _ in range(3))
    whole.train()
    store = CheckpointStore(tmp_path)
    first.train(store, max_steps=len(first.loader) + 1)
    newest = store.load_newest()
    assert newest is not None
    second.restore(newest)
    second.train(store)
    without_time = [
        [{name: value for name, value in line.items() if name != "seconds"} for line in each.progress.history]
        for each in (whole, second)
    ]
    assert len(without_time[0]) == 3
    assert without_time[0] == without_time[1]


def test_curves_leave_out_evaluations_of_a_part() -> None:
    row = {"epoch": 4, "train_loss": 2.0, "full": False, "hr@10": 0.1}
    assert curve_rows([row]) == [{"epoch": 5, "train_loss": 2.0}]


def test_a_run_that_has_its_steps_takes_no_more(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    make_trainer(ragged_dataset).train(store, max_steps=2)
    again = make_trainer(ragged_dataset)
    again.restore(store.load_newest())
    assert again.train(store, max_steps=2) is not None and again.progress.step == 2
    assert store.load_newest().position.step == 2


def test_without_validation_targets_the_last_epoch_is_kept(
    ragged_dataset: SequenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    split = make_split(ragged_dataset, "leave_one_out")
    bare = dataclasses.replace(split, validation_targets=np.full_like(split.validation_targets, -1))
    chosen = settings(num_epochs=2, local_batch_size=16, eval_batch_size=8)
    with caplog.at_level(logging.WARNING, logger="absl"):
        trainer = Trainer(chosen, ragged_dataset, bare, Collectives())
    assert "has no validation targets" in caplog.text
    result = trainer.train()
    assert trainer.progress.best_epoch is None and trainer.progress.epoch == 2
    assert result.metrics()["mrr"] > 0
    patient = chosen.bind({"train_fn.early_stopping_patience": 1})
    with pytest.raises(UserError, match="has no validation targets under protocol 'leave_one_out'"):
        Trainer(patient, ragged_dataset, bare, Collectives())


def test_checkpoints_are_counted_as_published(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    """After epochs 2 and 4, counted from 0, and at the end; protocol "paper" keeps no best one besides."""
    chosen = settings(num_epochs=6, local_batch_size=64, eval_batch_size=64, protocol="paper", save_ckpt_every_n=2)
    trainer = Trainer(chosen, ragged_dataset, make_split(ragged_dataset, "paper"), Collectives())
    trainer.train(CheckpointStore(tmp_path, 9))
    assert [path.name.split("-step")[0][-1] for path in CheckpointStore(tmp_path).paths()] == ["3", "5", "6"]


def test_a_resumed_run_draws_the_same_users_for_its_partial_evaluations(
    ragged_dataset: SequenceDataset, tmp_path: Path
) -> None:
    whole, first, second = (
        make_trainer(ragged_dataset, full_eval_every_n=5, partial_eval_num_iters=2) for _ in range(3)
    )
    whole.train()
    first.train(CheckpointStore(tmp_path), max_steps=len(first.loader) + 1)
    second.restore(CheckpointStore(tmp_path).load_newest())
    second.train(CheckpointStore(tmp_path))
    rows = [[each["hr@10"] for each in trainer.progress.history] for trainer in (whole, second)]
    assert rows[0] == rows[1]


def test_items_that_nobody_rated_are_negatives_and_candidates(tmp_path: Path) -> None:
    """They are drawn as often as others, get updates, and are ranked."""
    rated = tiny_dataset(tmp_path, ragged_sequences(57, 30, seed=5), item_features=True, unrated=10)
    data = rated.with_catalogue("all")
    assert (rated.num_items, data.num_items) == (30, 40)
    plain, whole = (make_trainer(each, num_negatives=50, sampling_strategy="local") for each in (rated, data))
    assert (len(plain.model.items.table), len(whole.model.items.table)) == (31, 41)
    batch = next(whole.loader.epoch(0))
    drawn = whole.task.prepare(batch, 0).negatives.ids
    assert abs((drawn > 30).float().mean().item() - 0.25) < 0.03
    table = whole.model.items.table.detach().clone()
    whole.train(max_steps=1)
    moved = (whole.model.items.table != table).any(1)
    assert moved[31:].all()
    assert whole.evaluation.test(whole.model).histogram.counts.shape[1] == 41
