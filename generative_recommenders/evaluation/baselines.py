"""Baselines beside every result: most popular items, and successors of the last item.

A model that does not beat them has learned nothing from sequences. Both are fitted on the training events alone, from the
flat columns of a prepared data set, and score as models do.
"""

from __future__ import annotations

import numpy as np
import torch

from generative_recommenders.data.splits import training_events


def training_counts(
    items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int
) -> torch.Tensor:
    """``[V]`` int64 training events of item i + 1. items: int ``[E]``, ids 1..V; the rest as in `training_events`."""
    counts = np.bincount(items[training_events(offsets, train_stops)], minlength=num_items + 1)[1:]
    return torch.from_numpy(counts)


class MostPopular:
    """Scores an item by its number of training events, the same for every user.

    Attributes:
        scores: ``[V]`` float32, counts; column i belongs to item i + 1.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    @classmethod
    def fit(
        cls, items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int
    ) -> MostPopular:
        """Arguments as in `training_counts`."""
        return cls(training_counts(items, offsets, train_stops, num_items).float())

    def score(self, history_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` float32, one row expanded; histories ``[n, N]`` and lengths ``[n]`` are not read."""
        return self.scores.to(history_ids.device).expand(len(lengths), -1)


class MarkovSuccessor:
    """Scores an item by how often it followed the history's last item in training.

    Equal counts are ordered by popularity, and so are the items that never followed, behind all that did. A
    last item without successors, and an empty history, leave plain popularity. The counts are sparse: memory
    is O(V + distinct pairs), at most O(V + E).

    Attributes:
        popularity: ``[V]`` float32 in [0, 1).
        starts: ``[V + 2]`` int64; the successors of item i are entries ``[starts[i], starts[i + 1])``.
        successors: int64, ids; values: float32, 1, 2, ... in the order of (count, popularity), equal where
            both are.
    """

    def __init__(
        self, popularity: torch.Tensor, starts: torch.Tensor, successors: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.popularity = popularity
        self.starts = starts
        self.successors = successors
        self.values = values

    @classmethod
    def fit(
        cls, items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int
    ) -> MarkovSuccessor:
        """Arguments as in `MostPopular.fit`."""
        counts = training_counts(items, offsets, train_stops, num_items).numpy().astype(np.float64)
        popularity = counts / (counts.max(initial=0) + 1)  # below 1: it orders equal counts and no others
        items, successors, values = _ordered_pairs(items, offsets, train_stops, popularity)
        starts = np.searchsorted(items, np.arange(num_items + 2))
        columns = (popularity.astype(np.float32), starts, successors, values.astype(np.float32))
        return cls(*(torch.from_numpy(column) for column in columns))

    def score(self, history_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` float32 for right-padded histories ``[n, N]`` int64 of the given lengths ``[n]``."""
        device = history_ids.device
        last = history_ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] * (lengths > 0)
        last = last.cpu()
        scores = self.popularity.to(device).repeat(len(last), 1)
        starts, stops = self.starts[last], self.starts[last + 1]
        rows = torch.arange(len(last)).repeat_interleave(stops - starts)
        first_entry = (stops - starts).cumsum(0) - (stops - starts)
        entries = torch.arange(len(rows)) - first_entry[rows] + starts[rows]
        columns = self.successors[entries] - 1
        scores[rows.to(device), columns.to(device)] = self.values[entries].to(device)
        return scores


def _ordered_pairs(
    items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, popularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (item, successor) pairs of training, sorted by item, and each pair's place among the item's pairs.

    The place counts distinct (count, popularity) from 1 upwards, so it stays exact in float32.
    """
    follows = training_events(offsets, train_stops)
    follows[offsets[:-1][offsets[:-1] < len(follows)]] = False  # the first event of a user follows nothing
    position = np.flatnonzero(follows)
    base = len(popularity) + 1  # a pair as one integer, so that distinct pairs are distinct numbers
    keys, counts = np.unique(
        items[position - 1].astype(np.int64) * base + items[position], return_counts=True
    )
    previous, successor = keys // base, keys % base
    strength = counts + popularity[successor - 1]
    order = np.lexsort((strength, previous))
    previous, successor, strength = previous[order], successor[order], strength[order]
    new_item = np.diff(previous, prepend=-1) > 0
    step = np.cumsum(new_item | (np.diff(strength, prepend=-1.0) != 0))
    start_of_item = np.maximum.accumulate(np.where(new_item, step, 0))
    return previous, successor, step - start_of_item + 1
