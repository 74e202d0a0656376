"""Exact ranks of scores that are products, without the scores of all items at once.

A block of items meets a block of users while the scores lie in a core's cache: one product, one comparison with each
user's threshold, one sum; every thread has items of its own. An item before the target counts where its score is at
least the target's, one after it where it is greater: so the threshold of the blocks before the target's own is the next
smaller number, and ties need no second look.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.evaluation.ranks import (
    candidates,
    count_ahead,
    exact_ranks,
    pairs_ahead,
    scores_of,
)
from generative_recommenders.evaluation.seen_filters import SeenItems
from generative_recommenders.modeling.similarity.interface import rounded
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.threads import in_threads

USERS, ITEMS = 512, 2048
"""Of a block: 4 MiB of scores."""
SHARD_SCORES = 1 << 25
"""Of a block on an accelerator, where the catalogue is sharded."""


@torch.no_grad()
def product_ranks(
    queries: torch.Tensor,
    items: torch.Tensor,
    target_ids: torch.Tensor,
    seen: SeenItems | None = None,
    shard: RowShard | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`exact_ranks` of the scores ``queries [n, D] · items [V, D]ᵀ``; ``[n]`` int64.

    Every product has the same shape, whatever the number of users, so that a user's rank does not depend on who is
    ranked beside them. On an accelerator the scores are held whole. shard: where ``items`` are those of this
    process alone: each counts its own, for the same users, and counts are summed over processes. dtype: what scores are
    rounded to, so that more of them are equal.
    """
    if not dispatch.fast_on_cpu(queries):
        return product_ranks_reference(queries, items, target_ids, seen, shard, dtype)
    parts = []
    for start in range(0, len(queries), USERS):
        rows = slice(start, start + USERS)
        own = None if seen is None else seen.rows_between(start, start + USERS)
        parts.append(_BlockOfUsers(queries[rows], items, target_ids[rows], own, shard, dtype).ranks())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def product_ranks_reference(
    queries: torch.Tensor,
    items: torch.Tensor,
    target_ids: torch.Tensor,
    seen: SeenItems | None = None,
    shard: RowShard | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`product_ranks` from all scores ``[n, V]``; of a shard from blocks of them.

    These are multiplied twice, since other processes need the target's score first, and it must be the block's own.
    """
    if shard is None:
        return exact_ranks(rounded(queries @ items.T, dtype), target_ids, seen)
    width = max(1, SHARD_SCORES // max(len(queries), 1))
    blocks = [(shard.before + start, items[start : start + width]) for start in range(0, len(items), width)]
    own, ahead = queries.new_zeros(len(queries)), torch.zeros_like(target_ids)
    for before, block in blocks:
        held = (target_ids > before) & (target_ids <= before + len(block))
        own += scores_of(rounded(queries @ block.T, dtype), target_ids - before).where(held, 0.0)
    own = shard.total(own)
    for before, block in blocks:
        ahead += count_ahead(rounded(queries @ block.T, dtype), before + 1, own, target_ids, seen)
    candidate = candidates(target_ids, shard.num_items, seen)
    return torch.where(candidate, 1 + shard.total(ahead), shard.num_items + 1)


class _BlockOfUsers:
    """At most `USERS` users, filled up with zeros, against the items of this process."""

    def __init__(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        target_ids: torch.Tensor,
        seen: SeenItems | None,
        shard: RowShard | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.queries, self.items, self.seen, self.shard, self.dtype = queries, items, seen, shard, dtype
        self.count, self.width = len(queries), min(ITEMS, len(items))
        self.num_items, self.before = (len(items), 0) if shard is None else (shard.num_items, shard.before)
        self.candidate = candidates(target_ids, self.num_items, seen)
        self.target_ids = target_ids.where(self.candidate, 0)  # 0 for none
        self.places = self.target_ids - self.before - 1
        self.held = self.candidate & (self.places >= 0) & (self.places < len(items))
        self.columns = F.pad(queries, (0, 0, 0, USERS - self.count)).T.contiguous()
        edges = torch.tensor([*range(0, len(items), ITEMS), len(items)])
        place, self.place_rows = self.places.sort(stable=True)
        self.target_bounds = torch.searchsorted(place, edges).tolist()
        none = torch.zeros(0, dtype=torch.int64)
        seen_ids, order = (none, none) if seen is None else seen.ids.sort(stable=True)
        first, last = torch.searchsorted(seen_ids - self.before - 1, edges[[0, -1]]).tolist()
        self.seen_ids, order = seen_ids[first:last], order[first:last]
        self.seen_rows = none if seen is None else seen.rows[order]
        seen_places = self.seen_ids - self.before - 1
        self.seen_bounds = torch.searchsorted(seen_places, edges).tolist()
        self.seen_cells = seen_places % ITEMS * USERS + self.seen_rows

    def ranks(self) -> torch.Tensor:
        """``[n]`` int64, `product_ranks` of these users."""
        misses = torch.full((self.count,), self.num_items + 1)
        if not self.candidate.any():
            return misses
        # A separate product may differ from the block's own in the last bit, and what is compared must be the block's
        # own.
        expected = self._total(self.target_scores()).where(self.candidate, torch.nan)
        ahead, own = self.count_ahead(expected)
        own = self._total(own).where(self.candidate, torch.nan)
        if not ((expected == own) | (expected.isnan() & own.isnan())).all():
            ahead, _ = self.count_ahead(own)
        ranks = torch.where(self.candidate, 1 + self._total(ahead), misses)
        for row in (own == -torch.inf).nonzero()[:, 0].tolist():  # below it there is no number
            alone = None if self.seen is None else self.seen.rows_between(row, row + 1)
            scores = rounded(self.queries[row : row + 1] @ self.items.T, self.dtype)
            target = own[row : row + 1], self.target_ids[row : row + 1]
            ranks[row] = 1 + self._total(count_ahead(scores, self.before + 1, *target, alone))
        return ranks

    def _total(self, own: torch.Tensor) -> torch.Tensor:
        """Summed over the processes that hold items."""
        return own if self.shard is None else self.shard.total(own)

    def target_scores(self) -> torch.Tensor:
        """``[n]``: the targets' scores by a product of their own, 0 for those that are not here."""
        rows = self.items[self.places.clamp(0, len(self.items) - 1)]
        scores = (rows @ self.columns)[:, : self.count].diagonal()
        return rounded(scores, self.dtype).where(self.held, 0.0)

    def count_ahead(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n]`` int64, the candidates ahead of targets of these scores ``[n]``, and the scores that the blocks give
        them, 0 for those that are not here.
        """
        strict = F.pad(targets, (0, USERS - self.count), value=torch.nan)
        loose = strict.nextafter(strict.new_tensor(-torch.inf))
        seen_scores = targets.new_empty(len(self.seen_ids))
        own_blocks = targets.new_full((self.count, self.width), torch.nan)
        blocks = list(enumerate(zip(pairwise(self.target_bounds), pairwise(self.seen_bounds))))

        def count(some: list) -> torch.Tensor:
            """``[USERS]``: scores of the items of some blocks, one after another, that are ahead."""
            buffer = strict.new_empty(self.width, USERS)
            before = some[0][1][0][0]  # targets in front of these blocks, and of no item
            threshold = loose.index_copy(0, self.place_rows[:before], strict[self.place_rows[:before]])
            counts = torch.zeros(USERS, dtype=torch.float64)
            for number, ((first, last), (a, b)) in some:
                block = self.items[number * ITEMS : (number + 1) * ITEMS]
                scores = torch.mm(block, self.columns, out=buffer[: len(block)])
                if self.dtype is not None:
                    scores.copy_(scores.to(self.dtype))
                if b > a:
                    seen_scores[a:b] = scores.take(self.seen_cells[a:b])
                if last > first:
                    rows = self.place_rows[first:last]
                    own_blocks[rows, : len(block)] = scores[:, rows].T
                    threshold[rows] = strict[rows]  # from here on ties rank lower
                counts.add_(scores.gt_(threshold).sum(0))
            return counts

        size = -(-len(blocks) // torch.get_num_threads())
        parts = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        counts = sum(in_threads(count, parts), torch.zeros(USERS, dtype=torch.float64))
        column = self.places.where(self.held, 0) % ITEMS
        own = own_blocks.gather(1, column[:, None])[:, 0].where(self.held, 0.0)
        ties = (own_blocks == targets[:, None]) & (torch.arange(self.width) < column[:, None])
        ahead = counts[: self.count].long() + ties.sum(1)
        # NaN compares as neither greater nor equal: without this a diverged model would rank every target first.
        ahead = ahead.where(~targets.isnan(), len(self.items) - self.held.long())
        seen_ahead = pairs_ahead(self.seen_rows, self.seen_ids, seen_scores, targets, self.target_ids)
        return ahead - seen_ahead, own
