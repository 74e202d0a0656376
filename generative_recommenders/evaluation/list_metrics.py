"""Recall, precision, NDCG, MAP, novelty, coverage and diversity of recommended lists.

Lists are ``[n, K]`` int64, best first, ids 1..V without repeats, 0 where a list is shorter (K may exceed the
catalogue). Relevant and seen items are ``[n, G]`` int64, in any order, padded with 0; repeats count once. The
metrics of a user are float64 ``[n]``.

Formulas, with h_r = 1 where the item at rank r is relevant and g = max(1, number of relevant items):
recall@k = sum_{r<=k} h_r / g; precision@k = sum h_r / k; ndcg@k = sum h_r / log2(r + 1), divided by the same
sum of min(g, k) hits in a row; map@k = sum h_r precision@r / min(g, k); mrr@k = 1 / rank of the first hit, 0
without one; hr@k = 1 with a hit, else 0. A user without relevant items scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.seen_filters import SeenItems
from generative_recommenders.retrieval.selection import fill, largest

_ONE = 2**39
"""Sums are integers in units of 2^-39: exact in any order, for up to 16 million users."""

_BLOCK_ELEMENTS = 2**23

MAX_DIVERSITY_LISTS = 2**14
"""Lists that diversity compares in pairs: of more users it takes this many, evenly spaced by user id."""


def distinct(ids: torch.Tensor) -> torch.Tensor:
    """Rows of ``ids [n, G]`` sorted, with repeats and ids below 1 replaced by 0."""
    ids = ids.clamp(min=0).sort(dim=1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids.masked_fill(repeated, 0)


def members(top_ids: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``[n, K]`` bool: whether each listed item is among the row's ``ids [n, G]``; False for padding."""
    if ids.shape[1] == 0:
        return torch.zeros_like(top_ids, dtype=torch.bool)
    ids = ids.sort(dim=1).values
    place = torch.searchsorted(ids, top_ids.contiguous()).clamp(max=ids.shape[1] - 1)
    return (ids.gather(1, place) == top_ids) & (top_ids > 0)


def accuracy_metrics(top_ids: torch.Tensor, relevant_ids: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """``recall``, ``precision``, ``ndcg``, ``map``, ``mrr``, ``hr`` at k, each ``[n]`` float64."""
    hits = members(top_ids[:, :k], relevant_ids).double()
    relevant = (distinct(relevant_ids) > 0).sum(1).clamp(min=1)
    values = metrics_of_hits(hits, relevant, k)
    ideal = (1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=hits.device))).cumsum(0)
    ndcg = values.pop("dcg") / ideal[relevant.clamp(max=k) - 1]
    return {**values, "ndcg": ndcg, "hr": (values["mrr"] > 0).double()}


def metrics_of_hits(hits: torch.Tensor, relevant: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """``recall``, ``precision``, ``dcg``, ``map`` and ``mrr`` at k, each ``[n]`` float64.

    hits: ``[n, K]`` float64, h_r of each rank. relevant: ``[n]``, number of relevant items, 1 or more.
    """
    hits = hits[:, :k]
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    return {
        "recall": hits.sum(1) / relevant,
        "precision": hits.sum(1) / k,
        "dcg": (hits / torch.log2(ranks + 1)).sum(1),
        "map": (hits * hits.cumsum(1) / ranks).sum(1) / relevant.clamp(max=k),
        "mrr": F.pad(hits / ranks, (0, 1)).amax(1),
    }


def novelty(top_ids: torch.Tensor, seen_ids: torch.Tensor, k: int) -> torch.Tensor:
    """``[n]`` float64: share of the k places with an item that is not among ``seen_ids [n, S]``."""
    top_ids = top_ids[:, :k]
    return ((top_ids > 0) & ~members(top_ids, seen_ids)).sum(1).double() / k


def diversity(top_ids: torch.Tensor) -> float:
    """Mean Jaccard distance 1 - |A and B| / |A or B| over all pairs of lists, exact; 0.0 with fewer than two.

    Pairs of two empty lists are left out. Work is O(n^2 K) additions, done in blocks: for a block of lists, a
    0/1 table [items, block] is summed over every list's items, which gives all overlaps with the block at
    once.
    """
    ids = distinct(top_ids)
    # Listed items numbered 1, 2, ...: the table is as large as the lists, not as the catalogue.
    _, codes = torch.cat([ids.new_zeros(1), ids.flatten()]).unique(return_inverse=True)
    codes = codes[1:].view_as(ids)
    sizes = (codes > 0).sum(1)
    if codes.numel() == 0:
        return 0.0
    table_rows = int(codes.max()) + 1
    block = max(1, min(1024, _BLOCK_ELEMENTS // max(table_rows, len(codes))))
    total, pairs = 0.0, 0
    for start in range(0, len(codes), block):
        some = codes[start : start + block]
        table = torch.zeros(table_rows, len(some), device=codes.device)
        table[some, torch.arange(len(some), device=codes.device)[:, None]] = 1
        table[0] = 0  # padding
        overlap = F.embedding_bag(codes[start:], table, mode="sum")
        union = sizes[start:, None] + sizes[start : start + block] - overlap
        counted = torch.ones_like(overlap, dtype=torch.bool).tril(-1) & (union > 0)  # every pair once
        distance = 1 - overlap.double() / union.clamp(min=1)
        total, pairs = total + float(distance[counted].sum()), pairs + int(counted.sum())
    return total / pairs if pairs else 0.0


class ListMetrics:
    """Sums of the list metrics over users, at several cutoffs, exact and independent of order.

    cutoffs: the k, 1 or more. num_items: V. item_counts: ``[V]`` training events of each item, for the popularity bias,
        or None.

    Attributes:
        sums: int64 ``[number of cutoffs, 7]`` in units of 2^-39 (recall, precision, ndcg, map, mrr, hr,
            novelty).
        users: int64 ``[1]``.
        recommended: int64 ``[number of cutoffs, V + 1]``, how often each id was recommended.
    Each of the three adds up across processes.
    """

    NAMES = ("recall", "precision", "ndcg", "map", "mrr", "hr", "novelty")

    def __init__(
        self,
        cutoffs: Sequence[int],
        num_items: int,
        item_counts: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cutoffs, self.item_counts = tuple(cutoffs), item_counts
        if min(self.cutoffs, default=0) < 1:
            raise UserError(f"ListMetrics: cutoffs must be 1 or more, got {list(self.cutoffs)}")
        self.sums = torch.zeros(len(self.cutoffs), len(self.NAMES), dtype=torch.int64, device=device)
        self.users = torch.zeros(1, dtype=torch.int64, device=device)
        self.recommended = torch.zeros(len(self.cutoffs), num_items + 1, dtype=torch.int64, device=device)

    def add(self, top_ids: torch.Tensor, relevant_ids: torch.Tensor, seen_ids: torch.Tensor | None = None) -> None:
        """Add users: lists ``[n, K]``, relevant ``[n, G]``, seen ``[n, S]`` (None: nothing seen).

        ``UserError`` for listed ids outside of 0..V.
        """
        num_items = self.recommended.shape[1] - 1
        if top_ids.numel() and not 0 <= int(top_ids.min()) <= int(top_ids.max()) <= num_items:
            low, high = int(top_ids.min()), int(top_ids.max())
            raise UserError(f"ListMetrics: listed ids reach from {low} to {high}, not 1..{num_items} (0: none)")
        seen_ids = top_ids[:, :0] if seen_ids is None else seen_ids
        for row, k in enumerate(self.cutoffs):
            values = accuracy_metrics(top_ids, relevant_ids, k) | {"novelty": novelty(top_ids, seen_ids, k)}
            stacked = torch.stack([values[name] for name in self.NAMES])
            # Fixed-point numbers: sums of floats would depend on the order of users and on the number of processes.
            self.sums[row] += (stacked * _ONE).round().long().sum(1)
            self.recommended[row] += torch.bincount(top_ids[:, :k].flatten(), minlength=num_items + 1)
        self.users += len(top_ids)

    def sum_over_processes(self, collectives: Collectives) -> None:
        """Adds up the numbers of all processes, in place: call it once."""
        for total in (self.sums, self.users, self.recommended):
            collectives.sum_(total)

    def compute(self, catalogue_size: int | None = None) -> dict[str, float]:
        """``name@k`` for each name and cutoff, ``coverage@k`` and, with item counts, ``popularity_bias@k``.

        Means over the users added, those without relevant items counting 0. Coverage is the number of items in some
        list over the size of the catalogue (V unless given). Popularity bias is the mean count of a recommended item
        over the mean count of a catalogue item: 1 for lists drawn uniformly, above 1 where popular items are favoured.
        """
        users = max(int(self.users), 1)
        metrics: dict[str, float] = {}
        for k, sums, counts in zip(self.cutoffs, self.sums.tolist(), self.recommended[:, 1:]):
            metrics |= {f"{name}@{k}": total / _ONE / users for name, total in zip(self.NAMES, sums)}
            metrics[f"coverage@{k}"] = int((counts > 0).sum()) / max(catalogue_size or len(counts), 1)
            if self.item_counts is not None:
                events = self.item_counts.to(counts.device).double()
                expected = float(counts.sum()) * float(events.mean())
                metrics[f"popularity_bias@{k}"] = float(counts.double() @ events) / expected if expected else 0.0
        return metrics


class TopLists:
    """Metrics of the k best items of each user, added up as they come.

    Of the lists themselves only those that diversity compares are kept, so that memory does not grow with the users.

    k: length of a list, which may exceed the catalogue. num_items: V. user_ids: ``[U]``, rising, everyone whose list is
    added by some process. item_counts: ``[V]`` training events, for the popularity bias, or None.
    """

    def __init__(self, k: int, num_items: int, user_ids: torch.Tensor, item_counts: torch.Tensor | None = None) -> None:
        self.k = k
        self.metrics = ListMetrics([k], num_items, item_counts)
        most = MAX_DIVERSITY_LISTS
        if len(user_ids) > most:
            user_ids = user_ids[torch.arange(most) * len(user_ids) // most]
        self.compared_users = user_ids
        self.compared = torch.zeros(len(user_ids), k, dtype=torch.int64)  # rows of other processes' users stay 0

    def add(
        self,
        scores: torch.Tensor,
        user_ids: torch.Tensor,
        target_ids: torch.Tensor,
        removed: SeenItems,
        history: SeenItems,
    ) -> None:
        """Users with their scores ``[n, V]``, each once over all calls and processes.

        user_ids: ``[n]``. target_ids: ``[n]`` the relevant items, below 1 for none. removed: items that are not
        candidates. history: items that are not new to the user. An item scored -inf or NaN is not a candidate either.
        """
        if len(removed.rows):
            scores = scores.clone()
            scores[removed.rows, removed.ids - 1] = -torch.inf
        values, columns = largest(scores, self.k)
        self.add_lists(fill(values, columns + 1, self.k)[1].cpu(), user_ids, target_ids, history)

    def add_lists(
        self, ids: torch.Tensor, user_ids: torch.Tensor, target_ids: torch.Tensor, history: SeenItems
    ) -> None:
        """Users with their lists ``ids [n, k]``, best first, 0 where there is none; the rest as in `add`."""
        self.metrics.add(ids, target_ids[:, None], ids * history.contains(ids))
        # torch.isin would sort all compared users for every call
        given = user_ids.contiguous()
        first, after = (torch.searchsorted(self.compared_users, given, right=right) for right in (False, True))
        rows = first < after
        self.compared[first[rows]] = ids[rows]

    def compute(self, collectives: Collectives) -> dict[str, float]:
        """``name@k`` as of `ListMetrics.compute`, and ``diversity@k``; equal for any number of processes.

        Call it once: it adds the processes' sums up in place.
        """
        self.metrics.sum_over_processes(collectives)
        lists = collectives.sum_(self.compared)  # in the users' order, on which sums of floats depend
        return {**self.metrics.compute(), f"diversity@{self.k}": diversity(lists)}
