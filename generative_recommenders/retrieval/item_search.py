"""The best items of the catalogue for histories and their queries: by products, by all scores, by popularity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.modeling.similarity.interface import Snapshot
from generative_recommenders.retrieval import quantized_search
from generative_recommenders.retrieval.histories import Histories
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.quantized_search import QuantizedItems
from generative_recommenders.retrieval.selection import fill, largest

Allowed = torch.Tensor | list[torch.Tensor] | None
"""Candidates: sorted internal ids ``[R]`` for all rows, or a list of these, one a row; None for the whole catalogue."""
MAX_SCORES = 1 << 25
"""Floats held at a time, scores of all items or embeddings of candidates: 128 MiB."""


class ItemSearch:
    """Finds the best items of each query.

    snapshot: the model's catalogue. counts: training events ``[V]`` to answer histories without items by, None where
    unknown.
    """

    def __init__(self, model: SequenceRecommender, snapshot: Snapshot, counts: torch.Tensor | None) -> None:
        self.model, self.snapshot, self.counts = model, snapshot, counts
        self.num_items = len(snapshot.embeddings)
        self._quantized: QuantizedItems | None = None  # made when it is first used

    def best(
        self,
        histories: Histories,
        queries: Queries,
        k: int,
        exclude_seen: bool = True,
        allowed: Allowed = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and internal ids ``[B, k]`` of the best items, on the CPU.

        queries: of the histories. An empty history gets the most popular items. Places without an item have minus
        infinity and id 0.
        """
        k, seen = min(k, self.num_items), None
        if exclude_seen:
            rows = [torch.from_numpy(each) for each in histories.seen]
            seen = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        product = self.model.similarity.operands(queries.states[:0], self.snapshot.embeddings[:0]) is not None
        if product and not isinstance(allowed, list):
            values, ids = self._search(queries, k, seen, allowed)
        else:
            every = torch.arange(len(queries.states))
            values, ids = self._by_all_scores(every, partial(self._scores, queries), k, seen, allowed)
        empty = (histories.batch["lengths"] == 0).nonzero()[:, 0]
        if len(empty):
            values[empty], ids[empty] = self._by_all_scores(empty, self._popularity, k, seen, allowed)
        return values, ids

    def _by_all_scores(
        self,
        rows: torch.Tensor,
        score: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        k: int,
        seen: torch.Tensor | None,
        allowed: Allowed,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`best` of some rows by all of their scores, as many rows at a time as `MAX_SCORES` allows.

        score: some rows, and the ids ``[R]`` or ``[n, R]``, padded with 0, of their candidates (None: all items), to
        their scores ``[n, R]``.
        """
        numbers = self.num_items
        if isinstance(allowed, list):  # whose embeddings are gathered for each row
            numbers = max(numbers, max(map(len, allowed)) * self.snapshot.embeddings.shape[1])
        values, ids = [], []
        for some in rows.split(max(1, MAX_SCORES // max(1, numbers))):
            own = allowed
            if isinstance(own, list):
                own = torch.nn.utils.rnn.pad_sequence([own[row] for row in some.tolist()], batch_first=True)
            scores = score(some, own)
            candidates = torch.arange(1, self.num_items + 1) if own is None else own
            candidates = candidates.expand(len(some), -1)
            if seen is not None:
                left_out = torch.zeros(len(some), self.num_items + 1, dtype=torch.bool).scatter_(1, seen[some], True)
                scores = scores.masked_fill(left_out.gather(1, candidates), -torch.inf)
            best, columns = largest(scores, k)
            best, found = fill(best, candidates.gather(1, columns), k)
            values.append(best)
            ids.append(found)
        return torch.cat(values), torch.cat(ids)

    @torch.no_grad()
    def _scores(self, queries: Queries, rows: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Scores of some of the queries, on the CPU."""
        users = None if queries.user_ids is None else queries.user_ids[rows]
        items = self.snapshot if allowed is None else allowed
        return self.model.score(Queries(queries.states[rows], users), items).float().cpu()

    def _popularity(self, rows: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Training events of all items for each row, or of those allowed, minus infinity for padding."""
        if self.counts is None:
            raise UserError("fallback='popular': checkpoints of releases before 0.2.0 have no counts of items")
        counts = self.counts.float()
        counts = counts if allowed is None else F.pad(counts, (1, 0), value=-torch.inf)[allowed]
        return counts.expand(len(rows), -1)

    def _search(
        self, queries: Queries, k: int, seen: torch.Tensor | None, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`best` of scores that are products, without holding them all."""
        rows = self.snapshot.embeddings
        if allowed is not None:
            rows = rows[(allowed - 1).to(rows.device)]
            place = torch.zeros(self.num_items + 1, dtype=torch.int64)
            place[allowed] = torch.arange(1, len(allowed) + 1)
            seen = None if seen is None else place[seen]
        similarity = self.model.similarity
        operands, dtype = similarity.operands(queries.states, rows), similarity.score_dtype
        assert operands is not None
        states, items = operands
        seen = None if seen is None else seen.to(items.device)
        found = None
        if allowed is None and dtype is None and quantized_search.is_faster(states, len(items)):
            self._quantized = self._quantized or QuantizedItems(items)
            found = self._quantized.search(states, k, seen)
        values, ids = found or search_products(states, items, k, seen, dtype)
        ids = ids.cpu() if allowed is None else F.pad(allowed, (1, 0))[ids.cpu()]
        return values.float().cpu(), ids
