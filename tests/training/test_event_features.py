"""Event columns as inputs: where one predicts the next item, ranks show it, whatever the encoder and objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.evaluate import open_run
from generative_recommenders.commands.setup import Options
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.training.trainer import Trainer
from tiny_models import settings

USERS, EVENTS, ITEMS = 150, 10, 20


def announced(folder: Path, shuffled: bool = False, scale: float = 1.0) -> SequenceDataset:
    """Items at random; ``shelf`` names the next one, and ``half`` says in which half of the catalogue it is."""
    generator = np.random.default_rng(0)
    items = generator.integers(0, ITEMS, (USERS, EVENTS + 1))
    following = (generator.permuted(items, axis=1) if shuffled else items)[:, 1:].flatten()
    columns = {
        "user": pa.array([f"u{user:03}" for user in range(USERS) for _ in range(EVENTS)], pa.large_string()),
        "item": pa.array([f"i{item:02}" for item in items[:, :-1].flatten()], pa.large_string()),
        "timestamp": pa.array(np.arange(USERS * EVENTS) + 1, pa.int64()),
        "shelf": pa.array([f"s{item:02}" for item in following], pa.large_string()),
        "half": pa.array(np.where(following < ITEMS // 2, 0.0, scale), pa.float32()),
    }
    prepare_batches(RawRatings("announced", [folder]), [pa.table(columns)], folder / "out", 1 << 30)
    return SequenceDataset.open(folder / "out")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return announced(tmp_path_factory.mktemp("announced"))


def make_trainer(dataset: SequenceDataset, *features: str, **choices: Any) -> Trainer:
    sizes = {"item_embedding_dim": 16, "max_sequence_length": 10, "local_batch_size": 32, "num_epochs": 12}
    chosen = settings(
        **{"learning_rate": 1e-2, "seen_filter": "none", "num_negatives": 16, **sizes, **choices},
        sampling_strategy="local", event_features=features,
    )  # fmt: skip
    return Trainer(chosen, dataset, make_split(dataset), Collectives())


def ndcg(dataset: SequenceDataset, *features: str, **choices: Any) -> float:
    return make_trainer(dataset, *features, **choices).train().metrics()["ndcg@10"]


@pytest.mark.parametrize("encoder", ENCODERS.names())
def test_a_category_that_names_the_next_item_is_read(dataset: SequenceDataset, encoder: str) -> None:
    assert ndcg(dataset, "shelf", main_module=encoder, num_epochs=6, negatives_sharing="block") > 0.8


def test_nothing_is_learnt_without_the_column_or_from_a_shuffled_one(dataset: SequenceDataset, tmp_path: Path) -> None:
    assert ndcg(dataset) < 0.4
    assert ndcg(announced(tmp_path, shuffled=True), "shelf") < 0.4


def test_a_number_that_halves_the_catalogue_is_read(dataset: SequenceDataset) -> None:
    assert 0.35 < ndcg(dataset, "half") < 0.7


@pytest.mark.parametrize("objective", ["masked", "permuted", "replaced"])
def test_objectives_that_hide_items_train_with_columns(dataset: SequenceDataset, objective: str) -> None:
    trainer = make_trainer(dataset, "shelf", "half", "timestamp", objective=objective, num_epochs=1)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items() if "event_features" in name}
    trainer.train()
    assert len(before) == 3
    for name, weight in before.items():
        assert not torch.equal(weight, trainer.model.state_dict()[name])


def test_resume_is_exact_and_other_columns_are_refused(dataset: SequenceDataset, tmp_path: Path) -> None:
    whole = make_trainer(dataset, "shelf", "half", num_epochs=2, dropout_rate=0.2)
    whole.train()
    store = CheckpointStore(tmp_path / "store")
    make_trainer(dataset, "shelf", "half", num_epochs=2, dropout_rate=0.2).train(store, max_steps=7)
    saved = store.load_newest()
    assert saved is not None
    resumed = make_trainer(dataset, "shelf", "half", num_epochs=2, dropout_rate=0.2)
    resumed.restore(saved)
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    other = announced(tmp_path, scale=2.0)
    assert other.manifest.data_hash == dataset.manifest.data_hash
    with pytest.raises(UserError, match="event columns of the data changed since this run began"):
        make_trainer(other, "shelf", "half", num_epochs=2, dropout_rate=0.2).restore(saved)


@pytest.mark.parametrize("features", [("shelf", "half"), ()])
def test_an_evaluation_refuses_other_columns_where_the_model_reads_some(
    dataset: SequenceDataset, tmp_path: Path, features: tuple[str, ...]
) -> None:
    trainer = make_trainer(dataset, *features, num_epochs=1, dataset_name=str(dataset.folder))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.attach(dataset.original_item_ids().combine_chunks(), trainer.settings.to_json(), "")
    trainer.train(store)
    other = announced(tmp_path, scale=2.0)

    def opened(data: SequenceDataset) -> SequenceDataset:
        binding = f"train_fn.dataset_name = {str(data.folder)!r}"
        return open_run(Options((), (binding,), tmp_path, run_dir=str(tmp_path / "run")), Collectives()).dataset

    assert opened(dataset).folder == dataset.folder
    if features:
        with pytest.raises(UserError, match="event columns of the data changed since this run began"):
            opened(other)
    else:
        assert opened(other).folder == other.folder


def test_unknown_columns_are_named(dataset: SequenceDataset) -> None:
    with pytest.raises(UserError, match="has no 'genre'; it has timestamp, shelf, half"):
        make_trainer(dataset, "genre")
    with pytest.raises(UserError, match="names 'shelf' twice"):
        make_trainer(dataset, "shelf", "shelf")
