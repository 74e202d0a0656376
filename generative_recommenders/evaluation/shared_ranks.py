"""Exact ranks of scores that nearly all users share, such as popularity with a few items raised for each user."""

from __future__ import annotations

from typing import NamedTuple

import torch

from generative_recommenders.evaluation.seen_items import SeenItems


class OwnScores(NamedTuple):
    """Row ``rows[s]`` scores item ``ids[s]`` as ``values[s]``; all ``[S]``, sorted by row, then id, and no pair twice."""

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
        """`exact_ranks` where rows score some items differently; ``[n]`` int64. Takes time by own and seen items alone."""
        candidate = (target_ids >= 1) & (target_ids <= self.num_items)
        if seen is not None:
            candidate &= ~seen.contains(target_ids)
        targets, rows = target_ids.where(candidate, 1), torch.arange(len(target_ids))
        values = self._values(own, rows, targets)
        ahead = torch.searchsorted(self.keys, self._key(values, targets))

        def number_ahead(rows: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            counted = (scores > values[rows]) | ((scores == values[rows]) & (ids < targets[rows]))
            return torch.bincount(rows[counted], minlength=len(targets))

        if own is not None:  # their shared scores count no more
            replaced = self.place[own.ids - 1] < ahead[own.rows]
            ahead -= torch.bincount(own.rows[replaced], minlength=len(targets))
            ahead += number_ahead(*own)
        if seen is not None:
            ahead -= number_ahead(seen.rows, seen.ids, self._values(own, seen.rows, seen.ids))
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
