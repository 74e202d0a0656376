"""Training on from another run, and parameters that stay as they are."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.training.fine_tuning import initialize
from generative_recommenders.training.trainer import Trainer
from programs import forked_members, run_program
from tiny_models import settings

SIZES = {
    "item_embedding_dim": 8,
    "num_epochs": 2,
    "local_batch_size": 16,
    "num_negatives": 4,
    "learning_rate": 1e-2,
}
MOL = {
    "interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK", "user_embedding_norm": "layer_norm",
    "mol.query_dot_product_groups": 3, "mol.uid_embedding_hash_sizes": (60,),
}  # fmt: skip
TOWER = {
    "main_module": "TwoTower", "item_tower.features": ("item_id", "genre", "year"), "negatives_sharing": "block",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "SASRec": {},
    "HSTU": {"main_module": "HSTU"},
    "plug-in": {"main_module": "GRU4Rec"},
    "MoL with users": MOL,
    "tower": TOWER,
    "features of users": {"item_tower.query_features": ("country",)},
    "categorical": {"embedding_module_type": "categorical", "category_feature": "genre"},
    "masked": {"objective": "masked"},
    "replaced": {"objective": "replaced", "loss_module": "CE"},
    "event columns": {"event_features": ("shelf", "half")},
}


def books(folder: Path, users: range, items: range) -> SequenceDataset:
    """Histories of 6 events; ``genre`` and ``year`` of items, ``country`` of users, ``shelf`` and ``half`` of
    events."""
    generator = np.random.default_rng(len(items))
    read = [[items[place] for place in generator.integers(0, len(items), 6)] for _ in users]
    read[0] = list(items)  # every item occurs
    events = [(user, item) for user, some in zip(users, read) for item in some]
    columns = {
        "user": pa.array([f"u{user:03}" for user, _ in events], pa.large_string()),
        "item": pa.array([f"i{item:03}" for _, item in events], pa.large_string()),
        "timestamp": pa.array(np.arange(len(events)) + 1, pa.int64()),
        "shelf": pa.array([f"s{item % 9:02}" for _, item in events], pa.large_string()),
        "half": pa.array([float(item % 2) for _, item in events], pa.float32()),
    }
    raw = RawRatings(
        "books", [folder],
        item_features=pa.table({
            "item": [f"i{item:03}" for item in items], "genre": [f"g{item // 6}" for item in items],
            "year": [1900.0 + item for item in items],
        }),
        user_features=pa.table({
            "user": [f"u{user:03}" for user in users], "country": [f"c{user // 10}" for user in users],
        }),
    )  # fmt: skip
    prepare_batches(raw, [pa.table(columns)], folder / "books", 1 << 30)
    return SequenceDataset.open(folder / "books")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return books(tmp_path_factory.mktemp("before"), range(5, 45), range(10, 34))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Earlier and later items and users than before, so that all numbers change; two items are gone."""
    return books(tmp_path_factory.mktemp("grown"), range(55), range(4, 32))


def make_trainer(dataset: SequenceDataset, **choices: Any) -> Trainer:
    """Initialized where the choices say so."""
    chosen = settings(**{**SIZES, **choices})
    trainer = Trainer(chosen, dataset, make_split(dataset), Collectives())
    initialize(chosen, trainer.task, trainer.catalogue, dataset)
    return trainer


def trained(folder: Path, dataset: SequenceDataset, **choices: Any) -> tuple[Trainer, Checkpoint]:
    """A run in the folder, and its newest checkpoint."""
    trainer, store = make_trainer(dataset, **choices), CheckpointStore(folder / "checkpoints")
    store.attach(dataset.original_item_ids().combine_chunks(), trainer.settings.to_json(), "")
    trainer.train(store)
    newest = store.load_newest()
    assert newest is not None
    return trainer, newest


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.task.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_the_data_are_the_same(kind: str, before: SequenceDataset, tmp_path: Path) -> None:
    """Step 0 of the new run has the weights of the old one, those of the loss included."""
    _, newest = trained(tmp_path, before, **KINDS[kind])
    tuned = make_trainer(before, **KINDS[kind], initialize_from=str(newest.path), random_seed=7)
    for name, value in weights(tuned).items():
        if name.startswith(("model.", "criterion.")):
            assert torch.equal(value, newest.tensors[name]), name
    assert tuned.progress.step == 0 and not tuned.step.optimizer.state_tensors()
    assert torch.isfinite(torch.tensor(tuned.train().metrics()["mrr"]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_where_their_items_users_and_categories_are_now(
    kind: str,
    before: SequenceDataset,
    grown: SequenceDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, newest = trained(tmp_path, before, **KINDS[kind])
    fresh, choices = make_trainer(grown, **KINDS[kind]), {**KINDS[kind], "initialize_from": str(tmp_path)}
    with caplog.at_level(logging.INFO, "absl"):
        tuned = make_trainer(grown, **choices)
    best = CheckpointStore(tmp_path / "checkpoints", read_only=True).load_best()
    old = (newest if best is None else best).tensors
    items = {name: number for number, name in enumerate(before.original_item_ids().to_pylist(), 1)}
    now = grown.original_item_ids().to_pylist()
    assert f"{sum(name in items for name in now)} of 28 items known, 6 new, 2 gone" in caplog.text
    own, new, rows = weights(tuned), weights(fresh), {0: 0}
    if kind == "categorical":
        genres, there = (each.item_features()["genre"].to_pylist() for each in (grown, before))
        numbers = [{name: n for n, name in enumerate(sorted(set(names)), 1)} for names in (genres, there)]
        rows |= {n: numbers[1][name] for name, n in numbers[0].items() if name in numbers[1]}
    else:
        rows |= {n: items[name] for n, name in enumerate(now, 1) if name in items}
    check(own["model.items.table"], old["model.items.table"], new["model.items.table"], rows)
    if kind == "MoL with users":
        assert "40 of 55 users known" in caplog.text
        users = {name: number for number, name in enumerate(before.original_user_ids().to_pylist(), 1)}
        rows = {n: users[name] for n, name in enumerate(grown.original_user_ids().to_pylist(), 1) if name in users}
        name = "model.similarity.user_tables.0.weight"
        check(own[name], old[name], new[name], rows)
    categories = {
        "tower": ("model.items.tower.embedder.feature_embedders.genre.emb.weight", range(4, 32), range(10, 34), 6),
        "features of users": (
            "model.sequence.context_merger.embedder.feature_embedders.country.emb.weight", range(55), range(5, 45), 10,
        ),
    }  # fmt: skip
    if kind in categories:
        name, ours, theirs, size = categories[kind]
        numbers = [
            {c: n for n, c in enumerate(sorted({f"{e // size}" for e in each}, key=str), 1)} for each in (ours, theirs)
        ]
        rows = {0: 0, len(numbers[0]) + 1: len(numbers[1]) + 1}
        rows |= {n: numbers[1][c] for c, n in numbers[0].items() if c in numbers[1]}
        check(own[name], old[name], new[name], rows)
    if kind == "event columns":
        name = "model.sequence.event_features.weights.of_shelf"
        assert torch.equal(own[name], old[name])  # the same nine shelves
    assert torch.isfinite(torch.tensor(tuned.train().metrics()["mrr"]))


def check(own: torch.Tensor, old: torch.Tensor, new: torch.Tensor, rows: dict[int, int]) -> None:
    """Some rows are those of the old table, the others those of a table that was just made."""
    for row in range(len(own)):
        expected = old[rows[row]] if row in rows else new[row]
        assert torch.equal(own[row], expected), row
    assert len(rows) > 0


def test_another_objective_starts_its_mask_slot_anew_or_leaves_it(
    before: SequenceDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "causal", before)
    trained(tmp_path / "masked", before, objective="masked")
    with caplog.at_level(logging.INFO, "absl"):
        tuned = make_trainer(before, objective="masked", initialize_from=str(tmp_path / "causal"))
        make_trainer(before, initialize_from=str(tmp_path / "masked"))
    assert "new: mask_embedding.weight" in caplog.text and "left out: mask_embedding.weight" in caplog.text
    assert tuned.model.mask_embedding is not None


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"item_embedding_dim": 16}, r"items.table is \[25, 8\] there and \[25, 16\] here"),
        ({"max_sequence_length": 9}, r"sequence.preprocessor.position is \[10, 8\] there and \[12, 8\] here"),
        ({"main_module": "HSTU"}, "this run has sequence.encoder.blocks.0.*, the checkpoint has not"),
        ({"sasrec.num_blocks": 3}, "this run has sequence.encoder.blocks.2.*, the checkpoint has not"),
        ({"sasrec.num_blocks": 1}, "the checkpoint has sequence.encoder.blocks.1.*, this run has not"),
        ({"initialize_from": "nowhere"}, "there is no run with a whole checkpoint at 'nowhere'"),
        ({"initialize_from": "x" * 900}, "there is no run with a whole checkpoint at 'xxx"),
        ({"initialize_from": "\0"}, "there is no run with a whole checkpoint"),
        (
            {"embedding_module_type": "categorical", "category_feature": "genre"},
            "embeds items as 'local', this run as 'categorical'",
        ),
        (
            {"freeze": ("items.tabel",)},
            "no parameter is called 'items.tabel' or begins so; near: items.table",
        ),
        ({"freeze": ("",)}, "no parameter is called ''"),
        ({"freeze": ("sequence.enc",)}, "near: sequence.encoder"),
        ({"freeze": ("items", "sequence")}, "leaves nothing to train"),
    ],
)
def test_what_does_not_fit_reports_one_line_error(
    choices: dict, message: str, before: SequenceDataset, tmp_path: Path
) -> None:
    trained(tmp_path, before, num_epochs=0)
    with pytest.raises(UserError, match=message) as refused:
        make_trainer(before, **{"initialize_from": str(tmp_path), **choices})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("kind", "frozen", "optimizer"),
    [
        *(("SASRec", ("items.table",), each) for each in ("adamw", "lazy_adamw", "rowwise_adagrad")),
        *(("SASRec", ("sequence",), each) for each in ("adamw", "lazy_adamw", "rowwise_adagrad")),
        ("HSTU", ("sequence.encoder.blocks.0", "sequence.preprocessor"), "lazy_adamw"),
        ("tower", ("items.table", "items.tower.embedder"), "rowwise_adagrad"),
        ("MoL with users", ("similarity", "model.items"), "lazy_adamw"),
        ("replaced", ("items.table", "criterion.head"), "adamw"),
        ("masked", ("sequence.encoder", "mask_embedding.weight"), "rowwise_adagrad"),
    ],
)
def test_what_is_frozen_stays_bit_for_bit_and_resumes(
    kind: str, frozen: tuple[str, ...], optimizer: str, before: SequenceDataset, tmp_path: Path
) -> None:
    choices = {**KINDS[kind], "freeze": frozen, "optimizer": optimizer}
    choices |= {"weight_decay": 0.1, "max_grad_norm": 0.5}
    first = weights(make_trainer(before, **choices))
    whole, newest = trained(tmp_path / "whole", before, **choices)
    named = {name.removeprefix("model."): value for name, value in weights(whole).items()}
    held = {name for name in named if name.startswith(tuple(each.removeprefix("model.") for each in frozen))}
    parameters = {name.removeprefix("model.") for name, _ in whole.task.named_parameters()}
    for name in held:
        full = name if name in first else f"model.{name}"
        assert torch.equal(named[name], first[full]), name
    moved = [
        name for name in parameters - held if not torch.equal(named[name], first.get(name, first.get(f"model.{name}")))
    ]
    assert len(moved) > 0.5 * len(parameters - held)
    state = whole.step.optimizer.state_tensors()
    assert (
        not any(value.shape == whole.model.items.table.shape for value in state.values()) or "items.table" not in held
    )
    cut = CheckpointStore(tmp_path / "cut")
    half = make_trainer(before, **choices)
    half.train(cut, stop=lambda: half.progress.step == 4)
    resumed, saved = make_trainer(before, **choices), cut.load_newest()
    assert saved is not None
    resumed.restore(saved)
    resumed.train()
    for name, value in weights(resumed).items():
        assert torch.equal(value, newest.tensors.get(name, value)), name
    with pytest.raises(UserError, match="train_fn.freeze holds other parameters than when this run began"):
        make_trainer(before, **{**choices, "freeze": ()}).restore(saved)
    assert newest.state["frozen"]


def test_the_same_gradients_reach_what_is_not_frozen(before: SequenceDataset) -> None:
    """Each part frozen by itself changes nothing in the others' gradients."""
    for kind in ("SASRec", "HSTU", "tower", "MoL with users", "replaced"):
        free = make_trainer(before, **KINDS[kind])
        batch = next(iter(free.loader.epoch(0)))

        def gradients(trainer: Trainer, batch: Any = batch) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            rows, output = trainer.step.forward(trainer.task.prepare(batch, 0))
            (output.sum + sum(output.auxiliary.values())).backward()
            found = {name: p.grad for name, p in trainer.task.named_parameters() if p.grad is not None}
            return found | ({"rows": rows.weight.grad} if rows.weight.grad is not None else {})

        wanted = gradients(free)
        for part in sorted({name.removeprefix("model.").rsplit(".", 1)[0] for name in wanted if name != "rows"}):
            found = gradients(make_trainer(before, **KINDS[kind], freeze=(part,)))
            assert 0 < len(found) < len(wanted), part
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], msg=f"{kind}, {part}, {name}")


def test_a_run_of_the_program_starts_from_another(before: SequenceDataset, tmp_path: Path) -> None:
    """By gin; `resolved.gin` keeps the names, one process and two do the same, and a resumed run does not read its
    source."""
    shutil.copytree(before.folder, tmp_path / "prepared" / "books")
    gin = tmp_path / "run.gin"
    gin.write_text("\n".join([
        "train_fn.dataset_name = 'books'", "train_fn.item_embedding_dim = 8", "train_fn.max_sequence_length = 6",
        "train_fn.dropout_rate = 0.0", "sasrec_encoder.ffn_dropout_rate = 0.0", "train_fn.num_epochs = 1",
        "train_fn.random_seed = 3", "train_fn.sampling_strategy = 'local'", "train_fn.num_negatives = 4",
    ]))  # fmt: skip

    def run(name: str, *more: str) -> Any:
        folder = (f"--gin_config_file={gin}", f"--data_root={tmp_path}", f"--run_dir={tmp_path / name}")
        return run_program("main.py", *folder, *more, before=forked_members)

    def newest(name: str) -> Checkpoint:
        found = CheckpointStore(tmp_path / name / "checkpoints", read_only=True).load_newest()
        assert found is not None
        return found

    assert run("source").returncode == 0
    source = CheckpointStore(tmp_path / "source" / "checkpoints", read_only=True).load_best()
    assert source is not None
    tuned = (
        f"--gin_bindings=train_fn.initialize_from = {str(tmp_path / 'source')!r}",
        "--gin_bindings=train_fn.freeze = ['items.table']",
    )
    for name, processes, batch in (("one", 1, 12), ("two", 2, 6)):
        result = run(
            name,
            *tuned,
            f"--num_processes={processes}",
            f"--gin_bindings=train_fn.local_batch_size = {batch}",
            "--max_steps=2",
        )
        assert result.returncode == 0, result.stderr
        assert "24 of 24 items known, 0 new, 0 gone" in result.stderr
        assert "train_fn.freeze: 200 of" in result.stderr
        resolved = (tmp_path / name / "resolved.gin").read_text()
        assert "train_fn.freeze = ('items.table',)" in resolved and "train_fn.initialize_from = " in resolved
    one, two = newest("one").tensors, newest("two").tensors
    assert torch.equal(one["model.items.table"], source.tensors["model.items.table"])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    again = run("again", *tuned, "--resume", "--gin_bindings=train_fn.local_batch_size = 12")
    assert again.returncode == 0, again.stderr
    assert "items known" not in again.stderr
    assert torch.equal(newest("again").tensors["model.items.table"], one["model.items.table"])
    missing = run("other", *tuned)
    assert missing.returncode == 2 and "there is no run with a whole checkpoint" in missing.stderr
