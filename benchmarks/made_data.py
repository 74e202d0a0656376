"""Made histories of events, with the lengths and the popularity of items that public data have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import records  # noqa: F401  (the package's place)

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.store import SequenceDataset


def movie_lengths(users: int, generator: np.random.Generator) -> np.ndarray:
    """``[users]`` int64 as in ML-1M: log-normal around the median 95 from 18 on, longest 2276, mean 165."""
    return np.minimum(np.exp(generator.normal(np.log(95 - 17), 1.16, users)) + 17, 2276).astype(np.int64)


def zipf_items(count: int, num_items: int, generator: np.random.Generator) -> np.ndarray:
    """``[count]`` int64 items 1..V, item v with probability ~ v ** -0.8."""
    weights = np.cumsum(1.0 / np.arange(1, num_items + 1) ** 0.8)
    return 1 + np.searchsorted(weights, generator.random(count) * weights[-1])


def dataset_of(
    lengths: np.ndarray, items: np.ndarray, num_items: int, generator: np.random.Generator
) -> SequenceDataset:
    """Histories in memory, with seconds between events and ratings from 1 to 5.

    lengths: ``[U]``. items: of all users, one after the other, ids 1..num_items.
    """
    counts = {"users": len(lengths), "items": num_items, "events": len(items)}
    statistics = {"min": float(lengths.min()), "mean": float(lengths.mean()), "max": float(lengths.max())}
    return SequenceDataset(
        Path("made"),
        Manifest("made", counts, counts, statistics, True, True, data_hash="0" * 32, filter=""),
        items.astype(np.int32),
        generator.integers(1, 6, len(items)).astype(np.float32),
        10**9 + np.cumsum(generator.integers(1, 3600, len(items))),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
