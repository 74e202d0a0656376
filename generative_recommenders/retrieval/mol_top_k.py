"""Top-k by mixture of logits: exact, and the approximate searches of arXiv 2407.15462.

The approximate ones find candidates by plain dot products of components and score those alone by the mixture.
They keep the components of all items (``V * (Pi * d + E)`` floats).
"""

from __future__ import annotations

from itertools import product

import torch

from generative_recommenders.config.fields import Size
from generative_recommenders.config.registry import register_top_k
from generative_recommenders.modeling.similarity.mixture_of_logits import (
    ItemComponents,
    MoLSimilarity,
    QueryComponents,
)
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.selection import fill, largest
from generative_recommenders.retrieval.top_k import BruteForceTopK, TopKModule


@register_top_k("MoLBruteForceTopK")
class MoLBruteForceTopK(BruteForceTopK):
    """Exact: scores every item by the mixture."""

    similarity_type = MoLSimilarity


@register_top_k("MoLCombTopK")
class MoLCombTopK(TopKModule):
    """Candidates first, the mixture on those alone: the result never holds more items than there are candidates.

    k_per_group: candidates of each of the Pq * Pi pairs of a query's and an item's component.
    avg_top_k: candidates by the dot product of the components' means.
    """

    similarity_type = MoLSimilarity
    similarity: MoLSimilarity
    rows_at_a_time = 64

    def __init__(
        self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, k_per_group: Size, avg_top_k: Size
    ) -> None:
        super().__init__(similarity, item_embeddings)
        self.k_per_group, self.avg_top_k = k_per_group, avg_top_k
        with torch.no_grad():
            items = similarity.snapshot(item_embeddings).components
        self.register_buffer("item_components", items.components, persistent=False)
        self.register_buffer("item_gate", items.gate, persistent=False)
        self.item_components: torch.Tensor
        self.item_gate: torch.Tensor | None
        if avg_top_k:
            self.register_buffer("average", self.item_components.mean(1), persistent=False)
            self.average: torch.Tensor

    @property
    def items(self) -> ItemComponents:
        """Of all items, ``[V, Pi, d]``, with their gates."""
        return ItemComponents(self.item_components, self.item_gate)

    def search(
        self, queries: torch.Tensor, k: int, seen_ids: torch.Tensor | None, user_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, _ = self.similarity.query_components(queries, user_ids)
        ids = self.candidates(query, seen_ids).sort(dim=1).values
        none = ids == 0
        none[:, 1:] |= ids[:, 1:] == ids[:, :-1]
        scores = self.similarity.score_components(query, self.items, (ids - 1).clamp(min=0))
        values, columns = largest(scores.masked_fill(none, -torch.inf), k)
        return fill(values, ids.gather(1, columns), k)

    def candidates(self, query: QueryComponents, seen_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, Pq * Pi * k_per_group + avg_top_k]`` ids, 0 for none, repeats allowed."""
        found = []
        if self.k_per_group:
            for pair in product(query.components.unbind(1), self.items.components.unbind(1)):
                found.append(search_products(*pair, self.k_per_group, seen_ids)[1])
        if self.avg_top_k:
            mean = query.components.mean(1)
            found.append(search_products(mean, self.average, self.avg_top_k, seen_ids)[1])
        return torch.cat(found, dim=1)


@register_top_k("MoLNaiveTopK")
class MoLNaiveTopK(MoLCombTopK):
    """Candidates of pairs of components alone.

    k_per_group: candidates of each pair.
    """

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, k_per_group: Size) -> None:
        super().__init__(similarity, item_embeddings, k_per_group, 0)


@register_top_k("MoLAvgTopK")
class MoLAvgTopK(MoLCombTopK):
    """Candidates by the components' means alone.

    avg_top_k: candidates of a query.
    """

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, avg_top_k: Size) -> None:
        super().__init__(similarity, item_embeddings, 0, avg_top_k)
