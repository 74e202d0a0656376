"""Settings of a run's course that reach its steps: windows over whole histories, the learning rate along a cosine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings


def rates_and_targets(dataset: SequenceDataset, **choices: Any) -> tuple[list[float], int]:
    """The learning rate of every step of a run of two epochs, and the targets of one epoch."""
    chosen = settings(num_epochs=2, local_batch_size=16, max_sequence_length=10, **choices)
    trainer = Trainer(chosen, dataset, make_split(dataset), Collectives())
    rates, targets = [], 0
    for epoch in range(2):
        for batch in trainer.loader.epoch(epoch):
            rates.append(trainer.run_step(batch).learning_rate)
            targets += batch.global_tokens
    return rates, targets // 2


def make_trainer(dataset: SequenceDataset, **choices: Any) -> Trainer:
    cosine = {"learning_rate_schedule": "cosine", "num_warmup_steps": 3, "max_sequence_length": 10}
    chosen = settings(**{"num_epochs": 4, "local_batch_size": 16, **cosine, **choices})
    return Trainer(chosen, dataset, make_split(dataset), Collectives())


@pytest.mark.parametrize(
    "changed", [{}, {"local_batch_size": 32}, {"local_batch_size": 4}, {"training_windows": "all"}]
)
def test_the_learning_rate_of_a_resumed_run_falls_from_its_place_to_its_end(
    ragged_dataset: SequenceDataset, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """The place is counted in users: steps of another batch, or of more rows, are others than those done."""
    before, store = make_trainer(ragged_dataset), CheckpointStore(tmp_path)
    before.train(store, stop=lambda: before.progress.step == 6)  # of 4 steps an epoch
    newest = store.load_newest()
    assert newest is not None
    resumed = make_trainer(ragged_dataset, **changed)
    resumed.restore(newest)
    place = resumed.progress.epoch * len(resumed.loader) + resumed.progress.step_in_epoch
    length = 4 * len(resumed.loader)
    rates = [resumed.step.optimizer.rate(step) for step in range(6, 6 + length - place + 1)]
    full = resumed.settings.updates.learning_rate
    assert rates == pytest.approx([full * (1 + math.cos(math.pi * at / length)) / 2 for at in range(place, length + 1)])
    assert rates[-2] > 0 == rates[-1]
    if not changed:
        assert rates == [before.step.optimizer.rate(step) for step in range(6, 17)]
    again = make_trainer(ragged_dataset, **changed)  # after a step of the new kind
    resumed.train(store, stop=lambda: resumed.progress.step == 7)
    newest = store.load_newest()
    assert newest is not None
    again.restore(newest)
    assert [again.step.optimizer.rate(step) for step in range(7, 6 + len(rates))] == rates[1:]


def test_windows_over_whole_histories_train_on_every_target(ragged_dataset: SequenceDataset) -> None:
    stops = make_split(ragged_dataset).train_stops
    _, last = rates_and_targets(ragged_dataset)
    _, everything = rates_and_targets(ragged_dataset, training_windows="all")
    assert everything == sum(max(stop - 1, 0) for stop in stops.tolist())
    assert last == sum(min(max(stop - 1, 0), 10) for stop in stops.tolist()) < everything


def test_the_learning_rate_of_a_run_falls_to_its_end(ragged_dataset: SequenceDataset) -> None:
    constant, _ = rates_and_targets(ragged_dataset)
    falling, _ = rates_and_targets(ragged_dataset, learning_rate_schedule="cosine")
    assert len(set(constant)) == 1
    assert falling[0] == constant[0]
    assert falling == sorted(falling, reverse=True)
    assert falling[len(falling) // 2] == pytest.approx(constant[0] / 2)
    assert 0 < falling[-1] < 0.2 * constant[0]
