"""Baselines beside every result: most popular items, and successors of the last item.

A model that does not beat them has learned nothing from sequences. Both are fitted on the training events alone, from the
flat columns of a prepared data set, and are ranked as models are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from generative_recommenders.data.splits import training_events
from generative_recommenders.evaluation.seen_items import SeenItems
from generative_recommenders.evaluation.shared_ranks import OwnScores, SharedScores


def training_counts(
    items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int
) -> torch.Tensor:
    """``[V]`` int64 training events of item i + 1. items: int ``[E]``, ids 1..V; the rest as in `training_events`."""
    counts = np.bincount(items[training_events(offsets, train_stops)], minlength=num_items + 1)[1:]
    return torch.from_numpy(counts)


class MostPopular:
    """Scores an item by its number of training events, the same for every user.

    scores: ``[V]`` float32, counts; column i belongs to item i + 1.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        self.shared = SharedScores(scores)

    @classmethod
    def fit(
        cls, items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int
    ) -> MostPopular:
        """Arguments as in `training_counts`."""
        return cls(training_counts(items, offsets, train_stops, num_items).float())

    def ranks(
        self, batch: Mapping[str, torch.Tensor], target_ids: torch.Tensor, removed: SeenItems | None
    ) -> torch.Tensor:
        """``[n]`` int64, as `exact_ranks`; histories are not read."""
        return self.shared.ranks(target_ids, None, removed)


class MarkovSuccessor:
    """Scores an item by how often it followed the history's last item in training.

    Equal counts are ordered by popularity, and so are the items that never followed, behind all that did. A
    last item without successors, and an empty history, leave plain popularity. The counts are sparse: memory
    is O(V + distinct pairs), at most O(V + E).

    popularity: ``[V]`` float32 in [0, 1).

    Attributes:
        starts: ``[V + 2]`` int64; the successors of item i are entries ``[starts[i], starts[i + 1])``.
        successors: int64, rising ids; values: float32, 1, 2, ... in the order of (count, popularity), equal where
            both are.
    """

    def __init__(
        self, popularity: torch.Tensor, starts: torch.Tensor, successors: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.shared = SharedScores(popularity)
        self.starts, self.successors, self.values = starts, successors, values

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

    def ranks(
        self, batch: Mapping[str, torch.Tensor], target_ids: torch.Tensor, removed: SeenItems | None
    ) -> torch.Tensor:
        """``[n]`` int64, as `exact_ranks`, after right-padded histories ``item_ids [n, N]`` of the given ``lengths [n]``."""
        return self.shared.ranks(target_ids, self._own_scores(batch["item_ids"], batch["lengths"]), removed)

    def _own_scores(self, history_ids: torch.Tensor, lengths: torch.Tensor) -> OwnScores:
        last = history_ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] * (lengths > 0)
        starts, stops = self.starts[last], self.starts[last + 1]
        rows = torch.arange(len(last)).repeat_interleave(stops - starts)
        first_entry = (stops - starts).cumsum(0) - (stops - starts)
        entries = torch.arange(len(rows)) - first_entry[rows] + starts[rows]
        return OwnScores(rows, self.successors[entries], self.values[entries])


BASELINES: dict[str, type[MostPopular] | type[MarkovSuccessor]] = {
    "most popular": MostPopular,
    "last item's successor": MarkovSuccessor,
}
"""By the names that they have in tables."""


def _ordered_pairs(
    items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, popularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (item, successor) pairs of training, sorted by both, and each pair's place among the item's pairs.

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
    new_item = np.diff(previous[order], prepend=-1) > 0
    step = np.cumsum(new_item | (np.diff(strength[order], prepend=-1.0) != 0))
    place = np.empty_like(step)
    place[order] = step - np.maximum.accumulate(np.where(new_item, step, 0)) + 1
    return previous, successor, place
