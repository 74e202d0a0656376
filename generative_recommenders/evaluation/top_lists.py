"""Top-k lists of an exact evaluation, and their list metrics over all processes."""

from __future__ import annotations

import torch

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.list_metrics import ListMetrics, diversity
from generative_recommenders.evaluation.seen_items import SeenItems
from generative_recommenders.retrieval.selection import fill, largest

MAX_DIVERSITY_LISTS = 2**14
"""Lists whose pairs diversity compares: more users are represented by this many, evenly spaced by user id."""


class TopLists:
    """Collector of the k best items of each user; `compute` joins the lists of all processes.

    k: length of a list, which may exceed the catalogue. num_items: V. item_counts: ``[V]`` training events, for
    the popularity bias, or None.
    """

    def __init__(self, k: int, num_items: int, item_counts: torch.Tensor | None = None) -> None:
        self.k = k
        self.metrics = ListMetrics([k], num_items, item_counts)
        self.parts = [torch.zeros(0, k + 1, dtype=torch.int64)]

    def add(
        self,
        scores: torch.Tensor,
        user_ids: torch.Tensor,
        target_ids: torch.Tensor,
        removed: SeenItems | None,
        history: SeenItems,
    ) -> None:
        """Users with their scores ``[n, V]``, each once over all calls and processes.

        user_ids: ``[n]``. target_ids: ``[n]`` or ``[n, G]`` the relevant items, 0 for none. removed: items that are no
        candidates. history: items that are not new to the user. A score of -inf or NaN is no candidate either.
        """
        if removed is not None:
            scores = scores.clone()
            scores[removed.rows, removed.ids - 1] = -torch.inf
        values, columns = largest(scores, self.k)
        self.add_lists(fill(values, columns + 1, self.k)[1].cpu(), user_ids, target_ids, history)

    def add_lists(
        self, ids: torch.Tensor, user_ids: torch.Tensor, target_ids: torch.Tensor, history: SeenItems
    ) -> None:
        """Users with their lists ``ids [n, k]``, best first, 0 where there is none; the rest as in `add`."""
        relevant_ids = target_ids[:, None] if target_ids.ndim == 1 else target_ids
        self.metrics.add(ids, relevant_ids, ids * history.contains(ids))
        self.parts.append(torch.cat([user_ids[:, None], ids], dim=1))

    def compute(self, collectives: Collectives) -> dict[str, float]:
        """``name@k`` as of `ListMetrics.compute`, and ``diversity@k``; equal for any number of processes.

        Call it once: it adds the processes' sums up in place.
        """
        for total in (self.metrics.sums, self.metrics.users, self.metrics.recommended):
            collectives.sum_(total)
        lists = collectives.gather_variable(torch.cat(self.parts))
        lists = lists[lists[:, 0].argsort(), 1:]
        return {**self.metrics.compute(), f"diversity@{self.k}": diversity(evenly_spaced(lists))}


def evenly_spaced(lists: torch.Tensor, most: int = MAX_DIVERSITY_LISTS) -> torch.Tensor:
    """At most ``most`` rows of ``lists [n, k]``, in order; all of them where n allows."""
    if len(lists) <= most:
        return lists
    return lists[torch.arange(most, device=lists.device) * len(lists) // most]
