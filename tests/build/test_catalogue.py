"""Facts of the catalogue that a model is built from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from generative_recommenders.build import entity_features
from generative_recommenders.build.entity_features import FeatureReader, class_assignment
from generative_recommenders.build.parts import Catalogue
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from tiny_data import ragged_sequences, tiny_dataset


def test_catalogue_of_a_data_set(ragged_dataset: SequenceDataset) -> None:
    stops = np.minimum(ragged_dataset.lengths, 3)
    found = Catalogue.of(ragged_dataset, stops)
    seen = [ragged_dataset.items[start : start + stop] for start, stop in zip(ragged_dataset.offsets, stops)]
    expected = np.bincount(np.concatenate(seen), minlength=31)[1:]
    assert found.counts.tolist() == expected.tolist()
    assert (found.num_items, found.has_ratings, found.has_timestamps) == (30, True, True)
    with pytest.raises(UserError, match="train_fn.category_feature: 'genre' is no item feature of tiny; known: none"):
        Catalogue.of(ragged_dataset, stops, "genre")


def test_a_feature_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(9, 30, seed=5), item_features=True)
    reader = FeatureReader(dataset, "item", np.ones(30, bool))
    (genres,) = reader.read(["genres"], 4, "here")
    monkeypatch.setattr(entity_features, "MAX_BYTES", 8 * genres.values.numel() - 1)
    with pytest.raises(UserError, match=r"item feature 'genres', with lists of up to 2, takes 0.0 GiB, more than 0.0"):
        reader.read(["genres"], 4, "here")
    monkeypatch.setattr(entity_features, "MAX_BYTES", 30)
    with pytest.raises(UserError, match=r"classes by 'genres', with \d categories, takes 0.0 GiB"):
        class_assignment(genres)


@pytest.mark.parametrize("wrong", [0, 31])
def test_item_ids_out_of_range(ragged_dataset: SequenceDataset, wrong: int) -> None:
    items = np.array(ragged_dataset.items)
    items[5] = wrong
    with pytest.raises(UserError, match=r"outside 1..30; prepare the data again"):
        Catalogue.of(dataclasses.replace(ragged_dataset, items=items), ragged_dataset.lengths)
