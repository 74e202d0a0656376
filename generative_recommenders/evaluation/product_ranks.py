"""Exact ranks of scores that are products, without the scores of all items at once.

A block of items meets a block of users while the scores lie in a processor's cache: one product, one comparison with each
user's threshold, one sum. An item before the target counts where its score is at least the target's, one behind it where it
is greater: so the threshold of the blocks before the target's own is the next smaller number, and ties need no second look.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_items import SeenItems
from generative_recommenders.ops import dispatch

USERS, ITEMS = 512, 2048
"""Of a block: 4 MiB of scores."""


@torch.no_grad()
def product_ranks(
    queries: torch.Tensor, items: torch.Tensor, target_ids: torch.Tensor, seen: SeenItems | None = None
) -> torch.Tensor:
    """`exact_ranks` of the scores ``queries [n, D] · items [V, D]ᵀ``; ``[n]`` int64.

    Every product has the same shape, whatever the number of users, so that a user's rank does not depend on who is ranked
    beside them. On an accelerator the scores are held whole.
    """
    if not dispatch.fast_on_cpu(queries):
        return product_ranks_reference(queries, items, target_ids, seen)
    parts = []
    for start in range(0, len(queries), USERS):
        rows = slice(start, start + USERS)
        own = None if seen is None else seen.rows_between(start, start + USERS)
        parts.append(_ranks_of_block(queries[rows], items, target_ids[rows], own))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def product_ranks_reference(
    queries: torch.Tensor, items: torch.Tensor, target_ids: torch.Tensor, seen: SeenItems | None = None
) -> torch.Tensor:
    """`product_ranks` from all scores ``[n, V]``."""
    return exact_ranks(queries @ items.T, target_ids, seen)


def _ranks_of_block(
    queries: torch.Tensor, items: torch.Tensor, target_ids: torch.Tensor, seen: SeenItems | None
) -> torch.Tensor:
    count, num_items = len(queries), len(items)
    candidate = (target_ids >= 1) & (target_ids <= num_items)
    if seen is not None:
        candidate &= ~seen.contains(target_ids)
    misses = torch.full((count,), num_items + 1)
    if not candidate.any():
        return misses
    users = _BlockOfUsers(queries, items, target_ids.where(candidate, 0), seen)
    # A product apart may differ from the block's own in the last bit, and what is compared must be the block's own.
    expected = users.apart()
    ahead, own = users.ahead(expected)
    if not ((expected == own) | (expected.isnan() & own.isnan())).all():
        ahead, own = users.ahead(own)
    ranks = torch.where(candidate, 1 + ahead, misses)
    for row in (candidate & (own == -torch.inf)).nonzero()[:, 0].tolist():  # below it there is no number
        alone = None if seen is None else seen.rows_between(row, row + 1)
        ranks[row] = exact_ranks(queries[row : row + 1] @ items.T, target_ids[row : row + 1], alone)
    return ranks


class _BlockOfUsers:
    """At most `USERS` users, filled up with zeros, against all items. target_ids: 0 for none."""

    def __init__(
        self, queries: torch.Tensor, items: torch.Tensor, target_ids: torch.Tensor, seen: SeenItems | None
    ) -> None:
        self.count, self.items, self.target_ids = len(queries), items, target_ids
        self.columns = F.pad(queries, (0, 0, 0, USERS - self.count)).T.contiguous()
        self.starts = range(0, len(items), ITEMS)
        edges = torch.tensor([*self.starts, len(items)])
        place, self.place_rows = (target_ids - 1).sort(stable=True)
        self.target_bounds = torch.searchsorted(place, edges).tolist()
        none = torch.zeros(0, dtype=torch.int64)
        seen_ids, order = (none, none) if seen is None else seen.ids.sort(stable=True)
        self.seen_ids, self.seen_rows = seen_ids, none if seen is None else seen.rows[order]
        self.seen_bounds = torch.searchsorted(seen_ids - 1, edges).tolist()
        self.seen_cells = (seen_ids - 1) % ITEMS * USERS + self.seen_rows
        self.buffer = queries.new_empty(min(ITEMS, len(items)), USERS)

    def apart(self) -> torch.Tensor:
        """``[n]``: the targets' scores by a product of their own, NaN for none."""
        rows = self.items[(self.target_ids - 1).clamp(min=0)]
        scores = (rows @ self.columns)[:, : self.count].diagonal()
        return scores.masked_fill(self.target_ids == 0, torch.nan)

    def ahead(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n]`` int64, the candidates ahead of targets of these scores ``[n]``, and the scores that the blocks give them."""
        strict = F.pad(targets, (0, USERS - self.count), value=torch.nan)
        threshold = strict.nextafter(strict.new_tensor(-torch.inf))
        counts = torch.zeros(USERS, dtype=torch.float64)
        seen_scores = targets.new_empty(len(self.seen_ids))
        own_blocks = targets.new_full((self.count, len(self.buffer)), torch.nan)
        blocks = zip(self.starts, pairwise(self.target_bounds), pairwise(self.seen_bounds))
        for start, (first, last), (a, b) in blocks:
            block = self.items[start : start + ITEMS]
            scores = torch.mm(block, self.columns, out=self.buffer[: len(block)])
            if b > a:
                seen_scores[a:b] = scores.take(self.seen_cells[a:b])
            if last > first:
                rows = self.place_rows[first:last]
                own_blocks[rows, : len(block)] = scores[:, rows].T
                threshold[rows] = strict[rows]  # from here on ties are behind
            counts.add_(scores.gt_(threshold).sum(0))
        column = (self.target_ids - 1).clamp(min=0) % ITEMS
        own = own_blocks.gather(1, column[:, None])[:, 0]
        ties = (own_blocks == targets[:, None]) & (torch.arange(len(self.buffer)) < column[:, None])
        ahead = counts[: self.count].long() + ties.sum(1)
        # NaN compares as neither greater nor equal: without this a diverged model would rank every target first.
        ahead = ahead.where(~targets.isnan(), len(self.items) - 1)
        return ahead - self._seen_ahead(targets, seen_scores), own

    def _seen_ahead(self, targets: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        own, target_ids = targets[self.seen_rows], self.target_ids[self.seen_rows]
        earlier = self.seen_ids < target_ids
        other = self.seen_ids != target_ids
        counted = (scores > own) | ((scores == own) & earlier) | (own.isnan() & other)
        return torch.bincount(self.seen_rows[counted], minlength=self.count)
