"""Seen filters: the items that are no candidates for a user. A target among them is a miss, whatever its score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from generative_recommenders.config.registry import register_seen_filter
from generative_recommenders.data.loader import Histories

RowsAndItems = tuple[torch.Tensor, torch.Tensor]
"""int64 ``[S]`` each: row of the batch and item id of what is removed, in any order; repeats count once."""


class SeenFilter(ABC):
    """One of ``train_fn.seen_filter``. An item that is removed stays out of the ranks and the lists of its row."""

    @abstractmethod
    def removed(self, batch: Mapping[str, torch.Tensor], histories: Histories) -> RowsAndItems | None:
        """What is removed, None for nothing.

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
