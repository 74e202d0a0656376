"""Seen filters and seen items: what is no candidate for a user. A target among that is a miss, whatever its score.

Seen items are jagged: their memory grows with the events that there are, not with the longest history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from generative_recommenders.config.registry import register_seen_filter
from generative_recommenders.data.loader import Histories

RowsAndItems = tuple[torch.Tensor, torch.Tensor]
"""int64 ``[S]`` each: row of the batch and item id of what is removed, in any order; repeats count once."""


class SeenFilter(ABC):
    """One of ``train_fn.seen_filter``. An item that is removed stays out of the ranks and the lists of its row."""

    @abstractmethod
    def removed(self, batch: Mapping[str, torch.Tensor], histories: Histories) -> RowsAndItems | None:
        """The removed items, None for none.

        batch: columns of the evaluation loader, the model's window ``item_ids [B, N]`` and ``lengths [B]`` among them.
        histories: everything before the targets, also what is older than the window; read where it is asked for.
        """


@register_seen_filter("history", gin_name="history_filter")
class HistoryFilter(SeenFilter):
    """Everything that the user had before the target, as RecTools counts it."""

    def removed(self, batch: Mapping[str, torch.Tensor], histories: Histories) -> RowsAndItems:
        return histories.rows, histories["item_ids"]


@register_seen_filter("window", gin_name="window_filter")
class WindowFilter(SeenFilter):
    """The items of the model's input, as the published evaluation of HSTU has it.

    There a repeated target ranks one past the 2,500 candidates that are kept; here V + 1.
    """

    def removed(self, batch: Mapping[str, torch.Tensor], histories: Histories) -> RowsAndItems:
        rows, columns = (batch["item_ids"] > 0).nonzero(as_tuple=True)
        return rows, batch["item_ids"][rows, columns]


@register_seen_filter("none", gin_name="no_filter")
class NoFilter(SeenFilter):
    """Nothing: right where repeats are what is to be predicted."""

    def removed(self, batch: Mapping[str, torch.Tensor], histories: Histories) -> None:
        return None


@dataclass(frozen=True)
class SeenItems:
    """Item ``ids[s]`` belongs to row ``rows[s]``; both int64 ``[S]``, sorted by row, then id, and no pair twice."""

    rows: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, ids: torch.Tensor, num_items: int) -> SeenItems:
        """From pairs in any order; ids outside 1..V (padding) are left out."""
        real = (ids >= 1) & (ids <= num_items)
        # A pair as one integer: sorted by row, then id, and each once.
        keys = torch.unique(rows[real] * (num_items + 1) + ids[real])
        return cls(keys // (num_items + 1), keys % (num_items + 1))

    @classmethod
    def none(cls) -> SeenItems:
        """No item of any row."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    @classmethod
    def padded(cls, ids: torch.Tensor, num_items: int) -> SeenItems:
        """From rectangles ``[n, S]``, padded with 0."""
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        return cls.of(rows.flatten(), ids.flatten(), num_items)

    def rows_between(self, start: int, stop: int) -> SeenItems:
        """Those of the rows [start, stop), counted from 0 again."""
        bounds = torch.tensor([start, stop], device=self.rows.device)
        first, last = torch.searchsorted(self.rows, bounds).tolist()
        return SeenItems(self.rows[first:last] - start, self.ids[first:last])

    def contains(self, ids: torch.Tensor) -> torch.Tensor:
        """bool like ``ids [n]`` or ``[n, K]``: whether the row of each has that item."""
        if not len(self.rows):
            return torch.zeros_like(ids, dtype=torch.bool)
        base = int(torch.maximum(self.ids.max(), ids.max() if ids.numel() else self.ids.max())) + 1
        rows = torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.ndim - 1))
        keys, wanted = self.rows * base + self.ids, (rows * base + ids).contiguous()
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return (keys[place] == wanted) & (ids > 0)

    def rectangle(self, num_rows: int) -> torch.Tensor:
        """``[n, S]`` ids of n rows, padded with 0."""
        counts = torch.bincount(self.rows, minlength=num_rows)
        padded = self.ids.new_zeros(num_rows, int(counts.max()) if num_rows else 0)
        padded[torch.arange(padded.shape[1], device=counts.device) < counts[:, None]] = self.ids
        return padded

    def to(self, device: torch.device | str) -> SeenItems:
        """The same on another device."""
        return SeenItems(self.rows.to(device), self.ids.to(device))
