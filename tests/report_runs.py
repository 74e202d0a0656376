"""Data with titles and drawn ranks, for tests of reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from tiny_data import genres_and_years, ragged_sequences

HOSTILE = '<script>alert("x")</script> & $5 for $6 _^{ 日本'
"""A title that means harm."""


def titled_dataset(folder: Path, seed: int = 5) -> SequenceDataset:
    """60 users over 30 items with titles and genres; one title means harm."""
    events = [(u, i) for u, items in enumerate(ragged_sequences(60, 30, seed)) for i in items]
    users, items = (
        pa.array([f"{kind}{n:05}" for n in column], pa.large_string()) for kind, column in zip("ui", zip(*events))
    )
    times = pa.array(range(len(events)), pa.int64())
    table = pa.table({"user": users, "item": items, "timestamp": times})
    features = genres_and_years(sorted(set(items.to_pylist())))
    titles = pa.array([HOSTILE, *(f"Title of {n}" for n in range(2, 31))])
    field = pa.field("title", pa.string(), metadata={b"kind": b"text"})
    raw = RawRatings("tiny", [folder / "tiny.csv"], item_features=features.append_column(field, titles))
    prepare_batches(raw, [table], folder, 1 << 30)
    return SequenceDataset.open(folder)


def ranks_of(dataset: SequenceDataset, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drawn ranks of all users with a test target, some of them misses."""
    split = make_split(dataset, "leave_one_out")
    users = np.flatnonzero(split.test_targets >= 0)
    targets = dataset.items[dataset.offsets[users] + split.test_targets[users]].astype(np.int64)
    ranks = np.random.default_rng(seed).integers(1, dataset.num_items + 2, len(users))
    return torch.from_numpy(users + 1), torch.from_numpy(targets), torch.from_numpy(ranks)
