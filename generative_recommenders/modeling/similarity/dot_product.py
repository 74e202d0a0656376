"""The inner product of a query and an item."""

from __future__ import annotations

import torch

from generative_recommenders.config.fields import Positive
from generative_recommenders.config.registry import register_similarity
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.interface import AuxiliaryLosses, Similarity, rounded


@register_similarity("DotProduct")
class DotProductSimilarity(Similarity):
    """Dot products divided by a temperature, ``score(q, v) = <q, v> / temperature``; no parameters.

    temperature: scores are divided by it; small for cosines (``train_fn.item_l2_norm``), 1 for plain products.
    score_dtype: queries, items and scores are rounded to it; sums of products and what is returned stay float32.
    """

    def __init__(self, temperature: Positive = 1.0, score_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.temperature, self.score_dtype = temperature, score_dtype

    def operands(self, states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``states / temperature`` and the items, float32; their products are still to be rounded to
        ``score_dtype``."""
        return self._scaled(states.float()), rounded(weight.float(), self.score_dtype)

    def score(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """``[rows, R]`` for queries ``[rows, D]`` and items in one of three shapes.

        ``[R, D]`` or ``[1, R, D]``: the same items for all rows. ``[B, R, D]``: row b has items b where rows
        = B; where rows = B * r, rows b * r .. b * r + r - 1 share items b.
        """
        queries, items = self._scaled(queries), rounded(items, self.score_dtype)
        if items.dim() == 3 and items.shape[0] == 1:
            items = items[0]
        if items.dim() == 2:
            return rounded(queries @ items.T, self.score_dtype), {}
        groups = items.shape[0]
        if groups == 0 or len(queries) % groups:
            raise UserError(f"{len(queries)} queries do not divide among {groups} sets of items")
        grouped = queries.view(groups, len(queries) // groups, queries.shape[1])
        scores = torch.bmm(grouped, items.transpose(1, 2)).reshape(len(queries), items.shape[1])
        return rounded(scores, self.score_dtype), {}

    def _scaled(self, queries: torch.Tensor) -> torch.Tensor:
        queries = rounded(queries, self.score_dtype)
        return queries if self.temperature == 1 else queries / self.temperature
