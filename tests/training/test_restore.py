"""Restoring a run from a checkpoint that anybody may have written: all of it fits, or one line says what does not."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from generative_recommenders.data.sequence_dataset import SequenceDataset
from generative_recommenders.data.splits import make_split
from generative_recommenders.evaluation.collectives import Collectives
from generative_recommenders.features import UserError
from generative_recommenders.training.checkpoint import Checkpoint, CheckpointStore
from generative_recommenders.training.train import Trainer
from tiny_models import settings


def make_trainer(dataset: SequenceDataset) -> Trainer:
    chosen = settings(item_embedding_dim=8, num_epochs=1, local_batch_size=16, max_sequence_length=8)
    return Trainer(chosen, dataset, make_split(dataset), Collectives())


@pytest.fixture
def saved(ragged_dataset: SequenceDataset, tmp_path: Path) -> Checkpoint:
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset)
    trainer.train(store)
    newest = store.load_newest()
    assert newest is not None
    return newest


def changed(checkpoint: Checkpoint, section: str, key: str, value: Any) -> Checkpoint:
    """The state with one entry set, or left out where the value is ``...``."""
    state = copy.deepcopy(checkpoint.state)
    target = state if section == "" else state[section]
    if value is ...:
        del target[key]
    else:
        target[key] = value
    return dataclasses.replace(checkpoint, state=state)


def test_what_was_saved_is_taken_back(ragged_dataset: SequenceDataset, saved: Checkpoint) -> None:
    trainer = make_trainer(ragged_dataset)
    trainer.restore(saved)
    assert trainer.progress.step == saved.position.step > 0
    assert trainer.log.state() == saved.state["warnings"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved.tensors[f"model.{name}"])


def test_other_features_are_refused(ragged_dataset: SequenceDataset, saved: Checkpoint) -> None:
    make_trainer(ragged_dataset).restore(changed(saved, "", "features_hash", ...))  # as older programs wrote
    with pytest.raises(UserError, match="features of the data changed since this run began"):
        make_trainer(ragged_dataset).restore(changed(saved, "", "features_hash", "0"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "progress", ...),
        ("", "progress", []),
        ("", "warnings", ...),
        ("", "world_size", "two"),
        ("progress", "step", -1),
        ("progress", "epoch", 1.5),
        ("progress", "step_in_epoch", True),
        ("progress", "epochs_without_gain", 2**70),
        ("progress", "seconds", "long"),
        ("progress", "history", [3]),
        ("progress", "surprise", 1),
        ("progress", "best_epoch", "last"),
        ("warnings", "plateau", 3),
        ("warnings", "plateau", {"observe": 1}),
        ("warnings", "divergence", {"factor": "x", "smoothing": 0, "average": 0, "lowest": 0, "warned": 0}),
    ],
)
def test_a_forged_state_is_refused(
    ragged_dataset: SequenceDataset, saved: Checkpoint, section: str, key: str, value: Any
) -> None:
    trainer = make_trainer(ragged_dataset)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(UserError, match="does not hold the state of a run") as refused:
        trainer.restore(changed(saved, section, key, value))
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("damage", ["shape", "missing", "surplus"])
def test_a_forged_optimizer_state_is_refused(
    ragged_dataset: SequenceDataset, saved: Checkpoint, damage: str
) -> None:
    tensors = dict(saved.tensors)
    name = next(name for name in tensors if name.startswith("optimizer.") and name.endswith("exp_avg"))
    if damage == "shape":
        tensors[name] = tensors[name].flatten()[:1]
    elif damage == "missing":
        del tensors[name]
    else:
        tensors["optimizer.adamw.999.exp_avg"] = torch.zeros(2)
    with pytest.raises(UserError, match="optimizer's state does not fit the configuration: "):
        make_trainer(ragged_dataset).restore(dataclasses.replace(saved, tensors=tensors))
