"""Curves of a prepared data set that a reader of its numbers would ask for: lengths, popularity, times of training and test
events, and every column of the events.

All of it is counted in passes over the flat columns, so that memory stays that of the catalogue and the users.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from generative_recommenders.data.schema import is_missing
from generative_recommenders.data.splits import Split, training_events
from generative_recommenders.data.store import SequenceDataset

QUANTILES = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
TOP_SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
SAMPLED_EVENTS = 1_000_000
"""Values of a column that its quantiles are taken from, evenly spread over the events."""
_TIME_BINS, _SHOWN_BINS = 10_000, 50


def length_curve(dataset: SequenceDataset) -> dict[str, Any]:
    """Quantiles of the users' lengths, and the share of users with at least 1, 2, 4, ... events."""
    lengths = dataset.lengths
    powers = 2 ** np.arange(int(np.log2(lengths.max())) + 1)
    reached = [float((lengths >= power).mean()) for power in powers]
    return {
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(lengths, QUANTILES).tolist())),
        "share_of_users_with_at_least": dict(zip(map(str, powers), reached)),
    }


def popularity_curve(dataset: SequenceDataset) -> dict[str, Any]:
    """How events are spread over items: the share of the most popular, Gini's coefficient, and counts by rank for the plot."""
    counts = np.zeros(dataset.num_items + 1, np.int64)
    for first, last in dataset.user_blocks():
        items = dataset.items[int(dataset.offsets[first]) : int(dataset.offsets[last])]
        counts += np.bincount(items, minlength=len(counts))
    counts = np.sort(counts[1:])[::-1]
    reached = np.cumsum(counts) / counts.sum()
    tops = {str(share): float(reached[max(int(share * len(counts)), 1) - 1]) for share in TOP_SHARES}
    ranks = np.unique(np.geomspace(1, len(counts), 60).astype(int))
    return {
        "share_of_events_of_the_top": tops,
        "gini": float(2 * reached.mean() - 1 - 1 / len(counts)),
        "items_with_fewer_than_5_events": int((counts < 5).sum()),
        "events_by_rank": dict(zip(map(str, ranks), counts[ranks - 1].tolist())),
    }


def timeline(dataset: SequenceDataset, split: Split) -> dict[str, Any] | None:
    """When training events and targets happened, over all users; None without times.

    Where each user's last event is the target, most users' training events are later than many users' targets: what was
    popular after a target is known to the model that is asked for it. ``training_later_than_test`` is the share of training
    events later than a test target, in the mean over the targets.
    """
    times = dataset.timestamps
    if times is None:
        return None
    low, high = int(times.min()), int(times.max())  # of bins over all, since the events are not held at once
    edges = np.linspace(low, high + 1, _TIME_BINS + 1)
    train = np.zeros(_TIME_BINS, np.int64)
    for first, last in dataset.user_blocks():
        offsets = dataset.offsets[first : last + 1]
        mask = training_events(offsets - offsets[0], split.train_stops[first:last])
        train += np.histogram(times[offsets[0] : offsets[-1]][mask], edges)[0]
    parts = {"training": train}
    for name, targets in (("validation", split.validation_targets), ("test", split.test_targets)):
        parts[name] = np.histogram(times[(dataset.offsets[:-1] + targets)[targets >= 0]], edges)[0]
    later = 1 - np.cumsum(train) / max(train.sum(), 1)  # of the bins behind
    test = parts["test"]
    quantiles = {}  # as the starts of their bins
    for name, reached in ((name, np.cumsum(counts)) for name, counts in parts.items() if counts.any()):
        places = np.searchsorted(reached, np.maximum(np.array(QUANTILES) * reached[-1], 1))
        quantiles[name] = dict(zip(map(str, QUANTILES), map(_date, edges[places])))
    return {
        "quantiles": quantiles,
        "training_later_than_test": float((later * test).sum() / test.sum()) if test.any() else None,
        "bins_start": [_date(edge) for edge in edges[: -1 : _TIME_BINS // _SHOWN_BINS]],
        "events": {name: counts.reshape(_SHOWN_BINS, -1).sum(1).tolist() for name, counts in parts.items()},
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")


def event_columns(dataset: SequenceDataset) -> list[dict[str, Any]]:
    """Every column of the events beside user and item: its kind, the share that is missing, and what values it has."""
    step = max(1, dataset.num_events // SAMPLED_EVENTS)
    described = []
    for name, kind in dataset.manifest.kinds.items():
        if name == "item":
            continue
        values = np.asarray(dataset.columns[name][::step])
        there = values[~is_missing(name, values)]
        found: dict[str, Any] = {"name": name, "kind": kind, "missing": 1 - len(there) / len(values)}
        if kind == "categorical":
            counts, vocabulary = np.bincount(there, minlength=2), dataset.vocabulary(name)
            found["values"] = len(vocabulary)
            found["most_frequent"] = str(vocabulary[int(counts.argmax()) - 1]) if counts.any() else None
            found["share_of_most_frequent"] = float(counts.max() / max(len(there), 1))
        elif len(there):
            numbers = np.quantile(there, QUANTILES).tolist()
            shown = map(_date, numbers) if kind == "time" else numbers
            found["quantiles"] = dict(zip(map(str, QUANTILES), shown))
        described.append(found)
    return described
