"""Baselines beside every result: most popular items, and successors of the last item.

A model that does not beat them has learned nothing from sequences. Both are fitted on the training events alone, from
the flat columns of a prepared data set, and are ranked as models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from generative_recommenders.data.splits import training_counts, training_events
from generative_recommenders.evaluation.ranks import candidates, pairs_ahead
from generative_recommenders.evaluation.seen_filters import SeenItems


class OwnScores(NamedTuple):
    """Row ``rows[s]`` scores item ``ids[s]`` as ``values[s]``; all ``[S]``, sorted by row, then id, and no pair
    twice."""

    rows: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


class SharedScores:
    """Scores ``[V]`` of all items, the same for every user, and their order. No score is NaN."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores, self.num_items = scores, len(scores)
        self.ascending = scores.sort().values
        order = scores.sort(descending=True, stable=True).indices
        self.place = torch.empty_like(order)
        self.place[order] = torch.arange(self.num_items)
        self.keys = self._key(scores, torch.arange(1, self.num_items + 1))[order]

    def ranks(
        self, target_ids: torch.Tensor, own: OwnScores | None = None, seen: SeenItems | None = None
    ) -> torch.Tensor:
        """`exact_ranks` where rows score some items differently; ``[n]`` int64. Takes time by own and seen items
        alone."""
        candidate = candidates(target_ids, self.num_items, seen)
        targets, rows = target_ids.where(candidate, 1), torch.arange(len(target_ids))
        values = self._values(own, rows, targets)
        ahead = torch.searchsorted(self.keys, self._key(values, targets))
        if own is not None:  # their shared scores count no more
            replaced = self.place[own.ids - 1] < ahead[own.rows]
            ahead -= torch.bincount(own.rows[replaced], minlength=len(targets))
            ahead += pairs_ahead(*own, values, targets)
        if seen is not None:
            of_seen = self._values(own, seen.rows, seen.ids)
            ahead -= pairs_ahead(seen.rows, seen.ids, of_seen, values, targets)
        return torch.where(candidate, 1 + ahead, self.num_items + 1)

    def _key(self, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Integers in the order of (score down, id up); a value that no item has lies before the smaller ones."""
        greater = self.num_items - torch.searchsorted(self.ascending, values, right=True)
        known = greater + torch.searchsorted(self.ascending, values) < self.num_items
        return greater * (self.num_items + 1) + ids.where(known, 0)

    def _values(self, own: OwnScores | None, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The scores of items ``ids`` in these rows."""
        shared = self.scores[ids - 1]
        if own is None or not len(own.rows):
            return shared
        keys, wanted = (each * (self.num_items + 1) for each in (own.rows, rows))
        keys, wanted = keys + own.ids, wanted + ids
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[place] == wanted, own.values[place], shared)


class MostPopular:
    """Scores an item by its number of training events, the same for every user. Fitted on columns as of
    `training_counts`."""

    def __init__(self, items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int) -> None:
        counts = training_counts(items, offsets, train_stops, num_items)
        self.shared = SharedScores(torch.from_numpy(counts).float())

    def ranks(
        self, batch: Mapping[str, torch.Tensor], target_ids: torch.Tensor, removed: SeenItems | None
    ) -> torch.Tensor:
        """``[n]`` int64, as `exact_ranks`; histories are not read."""
        return self.shared.ranks(target_ids, None, removed)


class MarkovSuccessor:
    """Scores an item by how often it followed the history's last item in training.

    Equal counts are ordered by popularity, and so are the items that never followed, after all that did. A
    last item without successors, and an empty history, leave plain popularity. The counts are sparse: memory
    is O(V + distinct pairs), at most O(V + E). Fitted on columns as of `training_counts`.

    Attributes:
        starts: ``[V + 2]`` int64; the successors of item i are entries ``[starts[i], starts[i + 1])``.
        successors: int64, rising ids; values: float32, 1, 2, ... in the order of (count, popularity), equal where
            both are.
    """

    def __init__(self, items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int) -> None:
        counts = training_counts(items, offsets, train_stops, num_items).astype(np.float64)
        popularity = counts / (counts.max(initial=0) + 1)  # below 1: it orders equal counts and no others
        follows = training_events(offsets, train_stops)
        first = offsets[:-1][offsets[:-1] < len(follows)]
        follows[first] = False  # the first event of a user follows nothing
        position = np.flatnonzero(follows)
        base = num_items + 1  # a pair as one integer, so that distinct pairs are distinct numbers
        keys, times = np.unique(items[position - 1].astype(np.int64) * base + items[position], return_counts=True)
        previous, successor = keys // base, keys % base
        strength = times + popularity[successor - 1]
        order = np.lexsort((strength, previous))
        new_item = np.diff(previous[order], prepend=-1) > 0
        step = np.cumsum(new_item | (np.diff(strength[order], prepend=-1.0) != 0))
        # The place counts distinct (count, popularity) from 1 upwards, so it stays exact in float32.
        place = np.empty_like(step)
        place[order] = step - np.maximum.accumulate(np.where(new_item, step, 0)) + 1
        self.shared = SharedScores(torch.from_numpy(popularity.astype(np.float32)))
        self.starts = torch.from_numpy(np.searchsorted(previous, np.arange(num_items + 2)))
        self.successors = torch.from_numpy(successor)
        self.values = torch.from_numpy(place.astype(np.float32))

    def ranks(
        self, batch: Mapping[str, torch.Tensor], target_ids: torch.Tensor, removed: SeenItems | None
    ) -> torch.Tensor:
        """``[n]`` int64, as `exact_ranks`, after right-padded histories ``item_ids [n, N]`` of the given
        ``lengths [n]``."""
        last = batch["item_ids"].gather(1, (batch["lengths"] - 1).clamp(min=0)[:, None])[:, 0] * (batch["lengths"] > 0)
        starts, stops = self.starts[last], self.starts[last + 1]
        rows = torch.arange(len(last)).repeat_interleave(stops - starts)
        first_entry = (stops - starts).cumsum(0) - (stops - starts)
        entries = torch.arange(len(rows)) - first_entry[rows] + starts[rows]
        own = OwnScores(rows, self.successors[entries], self.values[entries])
        return self.shared.ranks(target_ids, own, removed)


BASELINES: dict[str, type[MostPopular] | type[MarkovSuccessor]] = {
    "most popular": MostPopular,
    "last item's successor": MarkovSuccessor,
}
"""By the names that they have in tables."""
