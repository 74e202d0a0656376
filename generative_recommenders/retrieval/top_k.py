"""Top-k modules: the k best items of each query out of a catalogue, with seen items left out."""

from __future__ import annotations

import torch

from generative_recommenders.config.registry import register_top_k
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.selection import scan

BLOCK_SCORES = 2**23
"""Scores held at a time."""


class TopKModule(torch.nn.Module):
    """Base of the searches over a catalogue as it is now.

    similarity: what the model was trained with, in evaluation mode (in training mode its dropout acts here too).
    item_embeddings: ``[V, D]`` as scored; row i belongs to id i + 1.
    """

    SUPPLIED = frozenset({"similarity", "item_embeddings"})
    """Passed by the program where a constructor asks for it; what else it takes are options."""
    similarity_type: type = object
    """Similarities that the search works with."""
    rows_at_a_time = 512
    """Queries searched together."""

    def __init__(self, similarity: Similarity, item_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.similarity = similarity
        self.register_buffer("item_embeddings", item_embeddings.detach(), persistent=False)
        self.item_embeddings: torch.Tensor

    @property
    def num_items(self) -> int:
        return len(self.item_embeddings)

    @torch.no_grad()
    def forward(
        self,
        queries: torch.Tensor,
        k: int,
        seen_ids: torch.Tensor | None = None,
        user_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``[n, k]`` and ids ``[n, k]`` of the k best items, best first, ties by the smaller id.

        queries: ``[n, D]``. seen_ids: ``[n, S]`` int64 padded with 0, left out. user_ids: ``[n]`` int64, for
            similarities that read them. A row with fewer than k items left ends with minus infinity and id 0.
        """
        parts = []
        for start in range(0, max(len(queries), 1), self.rows_at_a_time):
            rows = slice(start, start + self.rows_at_a_time)
            of_rows = (None if each is None else each[rows] for each in (seen_ids, user_ids))
            parts.append(self.search(queries[rows], k, *of_rows))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def search(
        self, queries: torch.Tensor, k: int, seen_ids: torch.Tensor | None, user_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` of at most ``rows_at_a_time`` queries."""
        raise NotImplementedError


@register_top_k("BruteForceTopK")
class BruteForceTopK(TopKModule):
    """Exact, for any similarity: scores every item, a block at a time."""

    def search(
        self, queries: torch.Tensor, k: int, seen_ids: torch.Tensor | None, user_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def scores(start: int, stop: int) -> torch.Tensor:
            snapshot = self.similarity.snapshot(self.item_embeddings[start:stop])
            return self.similarity.scores(queries, snapshot, user_ids)

        return scan(scores, self.num_items, k, max(1, BLOCK_SCORES // max(1, len(queries))), seen_ids)


@register_top_k("MIPSBruteForceTopK")
class MIPSBruteForceTopK(BruteForceTopK):
    """Exact top-k of scores that are products; a plug-in's scores that are none are searched as by `BruteForceTopK`."""

    def search(
        self, queries: torch.Tensor, k: int, seen_ids: torch.Tensor | None, user_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operands = self.similarity.operands(queries, self.item_embeddings)
        if operands is None:
            return super().search(queries, k, seen_ids, user_ids)
        return search_products(*operands, k, seen_ids, self.similarity.score_dtype)
