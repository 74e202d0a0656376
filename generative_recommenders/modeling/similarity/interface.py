"""What every similarity offers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch

AuxiliaryLosses = dict[str, torch.Tensor]

SharedRows = Iterable[tuple[slice, torch.Tensor]]
"""Consecutive queries and the items ``[R]`` int64 that all of them score; together all queries, in order."""


@runtime_checkable
class Similarity(Protocol):
    """A learned or fixed score of (query, item)."""

    @property
    def auxiliary_loss_names(self) -> frozenset[str]:
        """Names of the auxiliary losses that `score` returns in training mode."""

    def score(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """Scores of items by queries.

        queries: ``[n, D]``. items: ``[R, D']``, the same for every query, or ``[n, R, D']``. user_ids:
            ``[n]`` int64 or None; only similarities with user-id components read them.

        Returns ``[n, R]`` and the auxiliary losses, scalars by name (empty outside training mode).
        """

    def score_rows(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor,
        user_ids: torch.Tensor | None = None,
        shared: SharedRows = (),
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """Scores of each query's own items, ``items[rows[i]]`` for query i, and behind them of shared ones.

        items: ``[U, D']``. rows: ``[n, P]`` int64. What depends on an item alone is computed once for each of
            the U.
        Returns as `score`, ``[n, P + R]``.
        """
