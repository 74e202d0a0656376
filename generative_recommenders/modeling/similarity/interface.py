"""Interface of similarities: the score of an item by a query, in training and afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from generative_recommenders.ops.embedding import lookup_rows

AuxiliaryLosses = dict[str, torch.Tensor]

SharedRows = Iterable[tuple[slice, torch.Tensor]]
"""Consecutive queries and the items ``[R]`` int64 that all of them score; together all queries, in order."""


class Snapshot(NamedTuple):
    """The catalogue as scored. embeddings: ``[V, D']``, row i belongs to id i + 1. components: what a similarity
    computes of the items alone, or None."""

    embeddings: torch.Tensor
    components: Any = None


def rounded(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``x`` with the values that dtype has, in its own dtype; None rounds nothing."""
    return x if dtype is None else x.to(dtype).to(x.dtype)


class Similarity(torch.nn.Module):
    """A learned or fixed score of (query, item). `score` must be written; everything else follows from it until
    overridden.

    temperature: what scores are divided by. score_dtype: what product scores are rounded to, those by `operands` too;
    None, as of most, for no rounding.
    """

    temperature: float = 1.0
    score_dtype: torch.dtype | None = None

    @property
    def auxiliary_loss_names(self) -> frozenset[str]:
        """Names of the auxiliary losses of training mode."""
        return frozenset()

    def operands(self, states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Q and W, such that the scores of items ``weight [U, D']`` by ``states [n, D]`` are ``Q Wᵀ``; None where they
        are no product. Losses, ranks and top-k of products multiply these themselves, block by block."""
        return None

    def score(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """Scores of items by queries.

        queries: ``[n, D]``. items: ``[R, D']``, the same for every query, or ``[n, R, D']``. user_ids:
            ``[n]`` int64 or None; only similarities with user-id components read them.

        Returns ``[n, R]`` and the auxiliary losses, scalars by name (empty outside training mode).
        """
        raise NotImplementedError

    def forward(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """The same as `score`."""
        return self.score(queries, items, user_ids)

    def score_rows(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor,
        user_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scores of each query's own items, ``items[rows[i]]`` for query i.

        items: ``[U, D']``. rows: ``[n, P]`` int64. Returns ``[n, P]``, and the sums over these pairs that
            `auxiliary_losses` are made from.
        """
        return self.score(queries, lookup_rows(items, rows), user_ids)[0], {}

    def score_negatives(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor | SharedRows,
        user_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same of negatives ``[n, R]``, which auxiliary losses leave out; or of items that spans of queries
        share."""
        if isinstance(rows, torch.Tensor):
            return self.score(queries, lookup_rows(items, rows), user_ids)[0]
        users = (lambda span: None) if user_ids is None else (lambda span: user_ids[span])
        return torch.cat([self.score(queries[span], lookup_rows(items, ids), users(span))[0] for span, ids in rows])

    def auxiliary_losses(self, sums: dict[str, torch.Tensor]) -> AuxiliaryLosses:
        """Scalars by name, from sums over the pairs of one process or of several."""
        return {}

    def snapshot(self, embeddings: torch.Tensor) -> Snapshot:
        """The catalogue's items ``[V, D']`` with what depends on them alone."""
        return Snapshot(embeddings)

    def scores(self, queries: torch.Tensor, snapshot: Snapshot, user_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, V]`` scores of the whole catalogue by queries ``[n, D]``."""
        return self.score(queries, snapshot.embeddings, user_ids)[0]
