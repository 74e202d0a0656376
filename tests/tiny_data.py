"""Tiny data sets, made through the real preparation."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.store import SequenceDataset

SECONDS_BETWEEN = 1000


def ragged_sequences(num_users: int, num_items: int, seed: int) -> list[list[int]]:
    """Items 1..num_items of each user, 1 to 40 of them; every item occurs."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 41, num_users)
    sequences = [generator.integers(1, num_items + 1, length).tolist() for length in lengths]
    sequences[0] = [*range(1, num_items + 1)]
    return sequences


def tiny_dataset(
    folder: Path,
    sequences: list[list[int]],
    ratings: bool = True,
    timestamps: bool = True,
    item_features: bool = False,
    unrated: int = 0,
) -> SequenceDataset:
    """User u has these items in this order; event e of all has rating 1 + e % 5 and time 1000 (e + 1). item_features:
    each item has one or two ``genres`` and a ``year``. unrated: items that have features and no ratings.

    Items must be 1..V without gaps: an item's internal id is then the number given here.
    """
    events = [(f"u{user:05}", f"i{item:05}") for user, items in enumerate(sequences) for item in items]
    users, items = zip(*events)
    columns: dict[str, Sequence] = {"user": users, "item": items}
    if ratings:
        columns["rating"] = [1 + e % 5 for e in range(len(events))]
    if timestamps:
        columns["timestamp"] = [SECONDS_BETWEEN * (e + 1) for e in range(len(events))]
    names = sorted(set(items)) + [f"j{number}" for number in range(unrated)]
    features = genres_and_years(names) if item_features else None
    return dataset_of(columns, folder / "tiny", item_features=features)


def dataset_of(columns: Mapping[str, Sequence], folder: Path, **known: Any) -> SequenceDataset:
    """The prepared ``folder`` of these events: texts, ``rating`` numbers and ``timestamp`` seconds. known: of
    `RawRatings`."""
    kinds = {"rating": pa.float32(), "timestamp": pa.int64()}
    table = {name: pa.array(values, kinds.get(name, pa.large_string())) for name, values in columns.items()}
    raw = RawRatings(folder.name, [folder.with_suffix(".csv")], **known)
    prepare_batches(raw, [pa.table(table)], folder, 1 << 30)
    return SequenceDataset.open(folder)


def genres_and_years(items: list[str]) -> pa.Table:
    places = range(len(items))
    genres = [["even" if place % 2 == 0 else "odd"] + ["third"] * (place % 3 == 0) for place in places]
    return pa.table({"item": items, "genres": genres, "year": [1970.0 + place for place in places]})


def rewrite_manifest(folder: Path, changes: dict[str, Any], without: Collection[str] = ()) -> None:
    """Changes fields of a prepared folder's manifest, and takes others out."""
    path = folder / "manifest.json"
    stored = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in stored.items() if name not in without}))
