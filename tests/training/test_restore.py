"""Restoring a run from an untrusted checkpoint: all of it fits, or one line names what does not."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from absl import logging

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import load_model
from generative_recommenders.commands.setup import Options
from generative_recommenders.commands.train import final_record, resume
from generative_recommenders.config.registry import OBJECTIVES
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.training.debug import NonFiniteError
from generative_recommenders.training.optimizers import AdamW
from generative_recommenders.training.trainer import Trainer
from tiny_models import contracted, settings

FINAL = '{"step": 4, "part": "final", "model": "SASRec", "results": {}, "conditions": "full catalogue"}'


def make_trainer(dataset: SequenceDataset, batch: int = 16, **others: Any) -> Trainer:
    sizes = {"item_embedding_dim": 8, "num_epochs": 1, "local_batch_size": batch, "max_sequence_length": 8}
    return Trainer(settings(**{**sizes, **others}), dataset, make_split(dataset), Collectives())


def newest_of(store: CheckpointStore) -> Checkpoint:
    newest = store.load_newest()
    assert newest is not None
    return newest


def resumed_trainer(dataset: SequenceDataset, store: CheckpointStore, batch: int = 16, **others: Any) -> Trainer:
    trainer = make_trainer(dataset, batch, **others)
    trainer.restore(newest_of(store))
    return trainer


@pytest.fixture
def saved(ragged_dataset: SequenceDataset, tmp_path: Path) -> Checkpoint:
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset)
    trainer.train(store)
    return newest_of(store)


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


def test_a_checkpoint_is_due_by_time_and_changes_no_number(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    whole, often = make_trainer(ragged_dataset), make_trainer(ragged_dataset, checkpoint_minutes=1e-9)
    store = CheckpointStore(tmp_path, keep_last=100)
    whole.train()
    often.train(store)
    assert [int(path.name.split("-")[-1]) for path in store.paths()[:3]] == [1, 2, 3]
    resumed = make_trainer(ragged_dataset)
    resumed.restore(store.load(store.paths()[0]))
    assert resumed.progress.step_in_epoch == 1
    resumed.train()
    for trainer in (often, resumed):
        assert trainer.progress.history[0]["train_loss"] == whole.progress.history[0]["train_loss"]
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name])


def test_no_checkpoint_is_due_by_time_in_a_short_run(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=100)
    make_trainer(ragged_dataset, protocol="paper").train(store)
    assert len(store.paths()) == 1


class OtherProcess(Collectives):
    """One that is not the main process of two; the main one finds a checkpoint due at the second step."""

    rank = 1
    asked = 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (2,) and tensor.is_floating_point():
            assert tensor.tolist() == [0.0, 0.0]
            self.asked += 1
            tensor[1] = float(self.asked == 2)
        return tensor


def test_the_main_process_decides_when_a_checkpoint_is_due(ragged_dataset: SequenceDataset) -> None:
    trainer = make_trainer(ragged_dataset, checkpoint_minutes=1e-9)
    trainer.collectives = OtherProcess()
    assert trainer.agreed(False) == (False, False)
    assert trainer.agreed(False) == (False, True)


def test_a_long_evaluation_says_how_long_it_takes(
    ragged_dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(ragged_dataset, eval_batch_size=10)
    monkeypatch.setattr("generative_recommenders.distributed.progress.LOG_SECONDS", 0.0)
    trainer.evaluation.validation(trainer.model)
    assert re.search(r"evaluation: .* 2/6 \[.*<.*\]", capsys.readouterr().err)


def test_a_run_resumes_from_weights_alone(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset)
    trainer.save(store)
    resumed = resumed_trainer(ragged_dataset, store)
    assert resumed.train().metrics() == trainer.train().metrics()


def test_another_protocol_is_refused_by_its_name(ragged_dataset: SequenceDataset, saved: Checkpoint) -> None:
    other = make_trainer(ragged_dataset, protocol="paper")
    other.split = make_split(ragged_dataset, "paper")
    with pytest.raises(UserError, match=r"train_fn.protocol = 'paper' splits the data otherwise .* keep the protocol"):
        other.restore(saved)
    changed_data = changed(changed(saved, "", "split_hash", "0"), "", "data_hash", "0")
    with pytest.raises(UserError, match="the prepared data changed since this run began"):
        make_trainer(ragged_dataset).restore(changed_data)


def test_what_checkpoints_keep_of_the_data_is_read_once(
    ragged_dataset: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, facts = [], Catalogue.facts
    monkeypatch.setattr(Catalogue, "facts", lambda *given: calls.append(1) or facts(*given))
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset)
    trainer.train(store, stop=lambda: trainer.progress.step == 1)
    trainer.train(store)
    assert newest_of(store).state["data"] == json.loads(json.dumps(trainer.facts))
    assert len(store.paths()) == 2 and len(calls) == 1


def test_no_place_is_saved_twice(ragged_dataset: SequenceDataset, tmp_path: Path) -> None:
    """The best epoch is the last one here; a second checkpoint of it would push out an older one."""
    store, trainer = CheckpointStore(tmp_path, keep_last=100), make_trainer(ragged_dataset)
    trainer.train(store)
    trainer.train(store)
    assert [path.name for path in store.paths()] == [f"000001-epoch-1-step-{trainer.progress.step}"]
    assert store.best_path() == store.paths()[0]


@pytest.fixture
def finished(ragged_dataset: SequenceDataset, tmp_path: Path) -> CheckpointStore:
    """The checkpoints of a run of 4 steps, with its final record."""
    store, trainer = CheckpointStore(tmp_path / "checkpoints"), make_trainer(ragged_dataset)
    store.attach(pa.array(["a"]), trainer.settings.to_json(), "")
    trainer.train(store)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 3}}\n{FINAL}\n')
    return store


@pytest.mark.parametrize(
    ("choices", "asked", "expected"),
    [
        ({}, {}, True),
        ({}, {"max_steps": 2}, True),
        ({}, {"users_metrics": "ranks.csv"}, False),
        ({}, {"report": True}, False),
        ({"num_epochs": 2}, {}, False),
        ({"seen_filter": "none"}, {}, False),
        ({"num_epochs": 2}, {"max_steps": 4}, False),
    ],
)
def test_a_finished_run_is_left_as_it_is_unless_more_is_asked(
    ragged_dataset: SequenceDataset,
    finished: CheckpointStore,
    choices: dict[str, Any],
    asked: dict[str, Any],
    expected: bool,
) -> None:
    trainer = make_trainer(ragged_dataset, **choices)
    assert resume(trainer, finished)
    options = Options((), (), Path(), **{"report": False, **asked})
    assert (final_record(trainer, finished.folder.parent, options) is not None) == expected
    trainer.train(finished, options.max_steps)
    # Other settings are saved, though no step be left.
    assert len(finished.paths()) == (2 if choices else 1)


def test_a_run_that_trains_on_is_not_finished(ragged_dataset: SequenceDataset, finished: CheckpointStore) -> None:
    (finished.folder.parent / "metrics.jsonl").write_text(f'{FINAL}\n{{"step": 4}}\n')
    trainer = make_trainer(ragged_dataset)
    assert resume(trainer, finished)
    assert final_record(trainer, finished.folder.parent, Options((), (), Path(), report=False)) is None


def test_the_weights_a_run_began_with_cannot_be_changed_later(
    ragged_dataset: SequenceDataset, finished: CheckpointStore
) -> None:
    with pytest.raises(UserError, match=r"initialize_from is 'other', and this run began with None: keep that, or"):
        resume(make_trainer(ragged_dataset, initialize_from="other"), finished)


def test_other_features_are_refused(ragged_dataset: SequenceDataset, saved: Checkpoint) -> None:
    make_trainer(ragged_dataset).restore(changed(saved, "", "features_hash", ...))  # as older programs wrote
    with pytest.raises(UserError, match="features of the data changed since this run began"):
        make_trainer(ragged_dataset).restore(changed(saved, "", "features_hash", "0"))


@pytest.mark.parametrize(
    ("steps", "batch", "expected"),
    [(3, 8, 6), (3, 4, 12), (3, 32, 1), (3, 20, 2), (4, 8, 7), (4, 52, 1), (4, 9, 6)],
)
def test_the_place_in_the_epoch_is_counted_in_users(
    ragged_dataset: SequenceDataset, tmp_path: Path, steps: int, batch: int, expected: int
) -> None:
    """52 users, 16 a step before; the ones after the whole steps of the new batch are seen again."""
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset)
    assert trainer.loader.users.size == 52
    done = iter(range(1, steps + 1))
    trainer.train(store, stop=lambda: next(done) == steps)
    resumed = resumed_trainer(ragged_dataset, store, batch)
    assert resumed.progress.step_in_epoch == expected
    users = [u for part in trainer.loader.epoch(0) for u in part.columns["user_ids"].tolist()]
    left = [u for part in resumed.loader.epoch(0, expected) for u in part.columns["user_ids"].tolist()]
    assert left == users[expected * batch :]


def test_a_run_resumes_where_an_epoch_has_fewer_steps_than_before(
    ragged_dataset: SequenceDataset, tmp_path: Path
) -> None:
    store, trainer = CheckpointStore(tmp_path), make_trainer(ragged_dataset, 8, training_windows="all")
    done = len(trainer.loader) - 1
    trainer.train(store, stop=lambda: trainer.progress.step == done)
    resumed = resumed_trainer(ragged_dataset, store, 8, training_windows="last")
    assert done > len(resumed.loader)
    assert resumed.train() is not None
    assert (resumed.progress.epoch, resumed.progress.step) == (1, done)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "progress", ...),
        ("", "progress", []),
        ("", "warnings", ...),
        ("", "world_size", "two"),
        ("", "global_batch", 0),
        ("", "global_batch", ...),
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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("shape", "the optimizer's state does not fit the configuration: "),
        ("dtype", r"exp_avg is torch.Size\(.*\) of torch.float16"),
        ("missing", "lacks optimizer state: it can be evaluated, not resumed"),
        ("all missing", "lacks optimizer state: it can be evaluated, not resumed"),
        ("another", "does not fit the configuration: adamw.0.exp_avg is missing"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused_by_a_resume_alone(
    ragged_dataset: SequenceDataset, saved: Checkpoint, damage: str, said: str
) -> None:
    tensors = dict(saved.tensors)
    name = next(name for name in tensors if name.startswith("optimizer.") and name.endswith("exp_avg"))
    if damage == "shape":
        tensors[name] = tensors[name].flatten()[:1]
    elif damage == "dtype":
        tensors[name] = tensors[name].half()
    elif damage == "missing":
        del tensors[name]
    elif damage == "all missing":
        tensors = {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
    else:
        tensors["optimizer.adamw.999.exp_avg"] = tensors.pop(name)
    changed = dataclasses.replace(saved, tensors=tensors)
    load_model(make_trainer(ragged_dataset).model, changed)
    with pytest.raises(UserError, match=said):
        make_trainer(ragged_dataset).restore(changed)


@pytest.mark.parametrize("damage", ["dtype", "nan", "inf"])
def test_weights_of_another_dtype_or_that_are_not_finite_are_refused(
    ragged_dataset: SequenceDataset, saved: Checkpoint, damage: str
) -> None:
    name = "model.items.table"
    table = saved.tensors[name].double() if damage == "dtype" else saved.tensors[name].clone()
    if damage != "dtype":
        table[3, 1] = float(damage)
    forged = dataclasses.replace(saved, tensors={**saved.tensors, name: table})
    said = "is torch.float64, not torch.float32" if damage == "dtype" else "holds numbers that are not finite"
    with pytest.raises(UserError, match=f"{name} {said}"):
        load_model(make_trainer(ragged_dataset).model, forged)


REPLACED = {"objective": "replaced", "loss_module": "CE"}


def stopped_after(dataset: SequenceDataset, store: CheckpointStore, steps: int, **choices: Any) -> None:
    trainer = make_trainer(dataset, **choices)
    trainer.train(store, stop=lambda: trainer.progress.step == steps)


@pytest.mark.parametrize("objective", contracted(OBJECTIVES))
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    ragged_dataset: SequenceDataset, tmp_path: Path, objective: str
) -> None:
    choices = {"objective": objective, "loss_module": "CE", "dropout_rate": 0.2, "learning_rate_schedule": "cosine"}
    whole, store = make_trainer(ragged_dataset, **choices), CheckpointStore(tmp_path)
    whole.train()
    stopped_after(ragged_dataset, store, 2, **choices)
    resumed = resumed_trainer(ragged_dataset, store, **choices)
    resumed.train()
    expected = whole.task.state_dict()
    assert [n for n, x in resumed.task.state_dict().items() if not torch.equal(x, expected[n])] == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor])
def test_a_run_resumes_with_any_optimizer_of_torch(
    ragged_dataset: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """SGD keeps nothing, Adafactor a row and a column of each matrix."""
    monkeypatch.setattr(AdamW, "dense", lambda self, parameters: kind(parameters, lr=self.learning_rate))
    whole, store = make_trainer(ragged_dataset), CheckpointStore(tmp_path)
    whole.train()
    stopped_after(ragged_dataset, store, 2)
    resumed = resumed_trainer(ragged_dataset, store)
    resumed.train()
    expected = whole.task.state_dict()
    assert [n for n, x in resumed.task.state_dict().items() if not torch.equal(x, expected[n])] == []


def test_a_discriminator_that_an_older_release_did_not_save_starts_anew(
    ragged_dataset: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    stopped_after(ragged_dataset, store, 2, **REPLACED)
    newest = newest_of(store)
    assert "criterion.head.weight" in newest.tensors
    old = {name: x for name, x in newest.tensors.items() if not name.startswith("criterion.")}
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    make_trainer(ragged_dataset, **REPLACED).restore(dataclasses.replace(newest, tensors=old))
    assert len(lines) == 1 and "holds no weights of the loss" in lines[0]
    part = {name: x for name, x in newest.tensors.items() if name != "criterion.head.bias"}
    with pytest.raises(UserError, match=r"does not fit the configuration: .*head.bias"):
        make_trainer(ragged_dataset, **REPLACED).restore(dataclasses.replace(newest, tensors=part))


def test_weights_of_the_loss_that_are_not_finite_end_the_run(ragged_dataset: SequenceDataset) -> None:
    trainer = make_trainer(ragged_dataset, **REPLACED)
    with torch.no_grad():
        trainer.task.criterion.head.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="the parameter criterion.head.bias is not finite"):
        trainer.train()
