"""Facts of the catalogue that a model is built from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from generative_recommenders.build.parts import Catalogue
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError


def test_catalogue_of_a_data_set(ragged_dataset: SequenceDataset) -> None:
    stops = np.minimum(ragged_dataset.lengths, 3)
    found = Catalogue.of(ragged_dataset, stops)
    seen = [ragged_dataset.items[start : start + stop] for start, stop in zip(ragged_dataset.offsets, stops)]
    expected = np.bincount(np.concatenate(seen), minlength=31)[1:]
    assert found.counts.tolist() == expected.tolist()
    assert (found.num_items, found.has_ratings, found.has_timestamps) == (30, True, True)
    with pytest.raises(UserError, match="train_fn.category_feature: 'genre' is no item feature of tiny; known: none"):
        Catalogue.of(ragged_dataset, stops, "genre")


@pytest.mark.parametrize("wrong", [0, 31])
def test_item_ids_out_of_range(ragged_dataset: SequenceDataset, wrong: int) -> None:
    items = np.array(ragged_dataset.items)
    items[5] = wrong
    with pytest.raises(UserError, match=r"outside 1..30; prepare the data again"):
        Catalogue.of(dataclasses.replace(ragged_dataset, items=items), ragged_dataset.lengths)
