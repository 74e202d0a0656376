"""Item tower of TwoTower: features, catalogue in blocks, gradients, and saved classes."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch

from generative_recommenders.build.entity_features import FeatureReader, class_assignment
from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders import two_tower
from generative_recommenders.modeling.encoders.two_tower import (
    ITEM_ID,
    EntityFeature,
    FeatureMerger,
    ItemTower,
    ItemTowerEmbedding,
)
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec
from generative_recommenders.modeling.items import ItemRows

ITEMS, DIM = 6, 4
GENRES = EntityFeature(
    EmbeddingSpec("genres", "categorical_list", DIM, 3, list_reduction="mean"),
    torch.tensor([[0, 0], [1, 0], [1, 2], [3, 0], [2, 3], [4, 0], [1, 3]]),
)
AUTHOR = EntityFeature(EmbeddingSpec("author", "categorical", DIM, 2), torch.tensor([0, 1, 1, 2, 2, 3, 1]))
YEAR = EntityFeature(EmbeddingSpec("year", "numerical", DIM), torch.linspace(-1, 1, ITEMS + 1))
FEATURES = (GENRES, AUTHOR, YEAR)


def tower(features=FEATURES, uses_item_id: bool = True) -> ItemTowerEmbedding:
    torch.manual_seed(1)
    return ItemTowerEmbedding(ITEMS, DIM, lambda *asked: features, (ITEM_ID,) if uses_item_id else ())


@pytest.mark.parametrize(("features", "uses_item_id"), [(FEATURES, True), (FEATURES, False), ((), True)])
def test_gathered_items_are_those_of_the_whole_catalogue(features, uses_item_id: bool) -> None:
    items = tower(features, uses_item_id)
    every = items.all_item_embeddings()
    assert every.shape == (ITEMS, DIM)
    assert torch.unique(every, dim=0).shape[0] == ITEMS
    ids = torch.tensor([2, 3, 6])
    leaf = ItemRows(items.table[ids].detach().requires_grad_(), ids)
    rows = items.scored_rows(leaf, ids)
    torch.testing.assert_close(rows.lookup(torch.tensor([6, 2, 2])), every[[5, 1, 1]])
    repeated = torch.tensor([[1, 4], [4, 0]])
    torch.testing.assert_close(items.get_item_embeddings(repeated)[0], every[[0, 3]])


def test_output_is_the_tower_of_summed_features() -> None:
    items = tower()
    embedder = items.tower.embedder
    genre, author = embedder.embedder("genres").emb.weight, embedder.embedder("author").emb.weight
    linear = embedder.embedder("year").linear
    summed = (genre[1] + genre[2]) / 2 + author[1] + linear(YEAR.values[2:3]) + items.table[2] * DIM**0.5
    torch.testing.assert_close(items.all_item_embeddings()[1], items.tower.encoder(summed[None])[0])


def test_evaluation_in_blocks_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    items = tower()
    whole = items.all_item_embeddings()
    monkeypatch.setattr(two_tower, "BLOCK_ITEMS", 4)
    calls = []
    items.tower.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    with torch.no_grad():
        torch.testing.assert_close(items.all_item_embeddings(), whole)
    assert calls == [4, 2]


def test_gradients_reach_gathered_rows_and_the_tower() -> None:
    items = tower()
    leaf = items.table[torch.tensor([2, 5])].detach().requires_grad_()
    ids = torch.tensor([2, 5])
    rows = items.scored_rows(ItemRows(leaf, ids), ids)
    (rows.weight * torch.randn(2, DIM)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().amax(1).min() > 0
    assert items.table.grad is None
    assert all(p.grad is not None for p in items.tower.parameters())


def test_a_tower_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"item_tower.num_blocks 0 must be 1 or more"):
        ItemTower([], DIM, 0)


def test_history_looks_up_the_id_table() -> None:
    items = tower()
    ids = torch.tensor([[3, 1], [0, 6]])
    torch.testing.assert_close(items.embed_history(ids), items.table[ids])


def test_a_checkpoint_brings_the_features_along() -> None:
    saved = tower().state_dict()
    blank = [EntityFeature(f.spec, torch.zeros_like(f.values)) for f in FEATURES]
    loaded = tower(blank)
    loaded.load_state_dict(saved)
    torch.testing.assert_close(loaded.all_item_embeddings(), tower().all_item_embeddings())


def test_refuses_no_feature_and_features_that_miss_items() -> None:
    with pytest.raises(UserError, match="names no feature"):
        tower((), uses_item_id=False)
    with pytest.raises(UserError, match="'author' has 5 rows for 6 items"):
        tower([EntityFeature(AUTHOR.spec, AUTHOR.values[:-1])])


def test_merger_adds_what_is_known_of_the_user() -> None:
    gender = EntityFeature(EmbeddingSpec("gender", "categorical", DIM, 2), torch.tensor([0, 1, 2, 2]))
    merger = FeatureMerger([gender], DIM)
    states = torch.randn(4, DIM)
    merged = merger(states, {"user_ids": torch.tensor([1, 3, 0, 99])})
    table = merger.embedder.embedder("gender").emb.weight
    torch.testing.assert_close(merged[:2], states[:2] + table[[1, 2]])
    torch.testing.assert_close(merged[2:], states[2:])
    torch.testing.assert_close(merger(states, {}), states)


# -- reading features of prepared data ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Items i1..i4; i4 is only ever last, so nobody trains on it; i3 has no features."""
    folder = tmp_path_factory.mktemp("featured")
    histories = [["i1", "i2", "i3", "i4"], ["i2", "i1", "i3", "i4"]]
    users, items = zip(*[(f"u{u}", item) for u, row in enumerate(histories) for item in row])
    events = pa.table({"user": pa.array(users, pa.large_string()), "item": pa.array(items, pa.large_string())})
    features = pa.table(
        {
            "item": ["i1", "i2", "i4"],
            "genres": [["war", "love"], ["love", "sea"], ["love", "space"]],
            "author": ["b", "a", "c"],
            "year": [1990.0, 2000.0, 2010.0],
        }
    )
    raw = RawRatings("featured", [folder / "x.csv"], item_features=features)
    prepare_batches(raw, [events], folder / "featured", 1 << 30)
    return SequenceDataset.open(folder / "featured")


@pytest.fixture
def reader(featured: SequenceDataset) -> FeatureReader:
    return FeatureReader(featured, "item", np.array([True, True, True, False]))


def test_categories_of_training_items_and_an_unknown_bucket(
    reader: FeatureReader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        genres, author = reader.read(["genres", "author"], DIM, "here", "max")
    assert (genres.spec.kind, genres.spec.cardinality, genres.spec.list_reduction) == (
        "categorical_list",
        3,
        "max",
    )
    # love 1, sea 2, war 3; 4 is unknown or missing
    assert genres.values.tolist() == [[0, 0], [3, 1], [1, 2], [4, 0], [1, 4]]
    assert author.values.tolist() == [0, 2, 1, 3, 3]
    assert "genres: 1 values were never seen" in caplog.text
    assert "genres: 1 values are missing" in caplog.text


def test_numbers_are_standardised_over_training_items(reader: FeatureReader) -> None:
    (year,) = reader.read(["year"], DIM, "here")
    assert year.spec.kind == "numerical"
    torch.testing.assert_close(year.values, torch.tensor([0.0, -1.0, 1.0, 0.0, 3.0]))


def test_a_number_that_training_items_share_scales_others_by_one(featured: SequenceDataset) -> None:
    (year,) = FeatureReader(featured, "item", np.array([True, False, False, False])).read(["year"], DIM, "x")
    assert year.values.tolist() == [0, 0, 10, 0, 20]


def test_features_that_do_not_exist_or_are_empty(reader: FeatureReader, featured: SequenceDataset) -> None:
    with pytest.raises(UserError, match="here: 'genre' is no item feature of featured; known: genres, author, year"):
        reader.read(["genre"], DIM, "here")
    nobody = FeatureReader(featured, "item", np.array([False, False, True, False]))
    for name in ("genres", "author", "year"):
        with pytest.raises(UserError, match=f"{name}' is empty"):
            nobody.read([name], DIM, "here")
    with pytest.raises(UserError, match="no user feature of featured; known: none"):
        FeatureReader(featured, "user", np.array([True, True])).read(["age"], DIM, "there")


def test_classes_of_items() -> None:
    assignment = class_assignment(GENRES)
    assert assignment.tolist() == [
        [True, True, False, False, False, True],
        [False, True, False, True, False, False],
        [False, False, True, True, False, True],
        [False, False, False, False, True, False],  # of no known category
    ]
