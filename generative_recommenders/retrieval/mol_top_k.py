"""Top-k by mixture of logits: exact, and the approximate searches of arXiv 2407.15462.

The approximate ones find candidates by plain dot products of components and score those alone by the mixture.
They keep the components of all items (``V * (Pi * d + E)`` floats). The similarity should be in evaluation
mode: in training mode its dropout acts here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.modeling.similarity.mixture_of_logits import (
    ItemComponents,
    MoLSimilarity,
    QueryComponents,
)
from generative_recommenders.retrieval.top_k import BruteForceTopK, MIPSBruteForceTopK, fill, largest, scan

_BLOCK_ELEMENTS = 2**22


class MoLBruteForceTopK(BruteForceTopK):
    """Exact: scores every item by the mixture. item_embeddings: ``[V, D]``; row i belongs to id i + 1."""

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor) -> None:
        super().__init__(len(item_embeddings), floats_per_score=similarity.num_logits)
        self.similarity = similarity
        self.register_buffer("item_embeddings", item_embeddings.detach(), persistent=False)
        self.item_embeddings: torch.Tensor

    def block_scores(
        self, queries: torch.Tensor, user_ids: torch.Tensor | None
    ) -> Callable[[int, int], torch.Tensor]:
        """Scores by the mixture; the queries' components are made once."""
        query, _ = self.similarity.query_components(queries, user_ids)

        def scores(start: int, stop: int) -> torch.Tensor:
            items = self.similarity.item_components(self.item_embeddings[start:stop])
            return self.similarity.score_components(query, items)[0]

        return scores


class _CandidateTopK(torch.nn.Module):
    """Candidates first, the mixture on those alone.

    item_embeddings: ``[V, D]``; row i belongs to id i + 1. The result never holds more items than there are
        candidates.
    """

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.similarity = similarity
        with torch.no_grad():
            components, gate = similarity.item_components(item_embeddings)
        self.register_buffer("item_components", components, persistent=False)
        self.register_buffer("item_gate", gate, persistent=False)
        self.item_components: torch.Tensor
        self.item_gate: torch.Tensor | None

    @property
    def items(self) -> ItemComponents:
        """Of all items, ``[V, Pi, d]``, with their gates."""
        return ItemComponents(self.item_components, self.item_gate)

    @torch.no_grad()
    def forward(
        self,
        queries: torch.Tensor,
        k: int,
        seen_ids: torch.Tensor | None = None,
        user_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `BruteForceTopK.forward`; places without a candidate hold minus infinity and id 0."""
        parts = []
        for start in range(0, max(len(queries), 1), 64):
            some = slice(start, start + 64)
            users = None if user_ids is None else user_ids[some]
            query, _ = self.similarity.query_components(queries[some], users)
            candidates = self.candidates(query, None if seen_ids is None else seen_ids[some])
            parts.append(self._best(query, candidates, k))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def candidates(self, query: QueryComponents, seen_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, C]`` ids, 0 for none, repeats allowed."""
        raise NotImplementedError

    def _best(
        self, query: QueryComponents, candidates: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = candidates.sort(dim=1).values
        none = ids == 0
        none[:, 1:] |= ids[:, 1:] == ids[:, :-1]
        scores, _ = self.similarity.score_components(query, self.items, (ids - 1).clamp(min=0))
        values, columns = largest(scores.masked_fill(none, -torch.inf), k)
        return fill(values, ids.gather(1, columns), k)

    def _by_average(
        self, query: QueryComponents, seen_ids: torch.Tensor | None, average: torch.Tensor, k: int
    ) -> torch.Tensor:
        """``[n, k]`` ids by the dot product of the mean components; average: ``[V, d]``."""
        return _search(query.components.mean(1), average, k, seen_ids)

    def _by_component(self, query: QueryComponents, seen_ids: torch.Tensor | None, k: int) -> torch.Tensor:
        """``[n, Pq * Pi * k]`` ids: the k best of every pair of a query and an item component."""
        found = [
            _search(query_part, item_part, k, seen_ids)
            for query_part in query.components.unbind(1)
            for item_part in self.items.components.unbind(1)
        ]
        return torch.cat(found, dim=1)


class MoLNaiveTopK(_CandidateTopK):
    """Candidates: the k_per_group best items of each of the Pq * Pi pairs of components."""

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, k_per_group: int) -> None:
        super().__init__(similarity, item_embeddings)
        self.k_per_group = _positive("k_per_group", k_per_group)

    def candidates(self, query: QueryComponents, seen_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, Pq * Pi * k_per_group]``."""
        return self._by_component(query, seen_ids, self.k_per_group)


class MoLAvgTopK(_CandidateTopK):
    """Candidates: the avg_top_k best items by the dot product of the components' means."""

    def __init__(self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, avg_top_k: int) -> None:
        super().__init__(similarity, item_embeddings)
        self.avg_top_k = _positive("avg_top_k", avg_top_k)
        self.register_buffer("average", self.item_components.mean(1), persistent=False)
        self.average: torch.Tensor

    def candidates(self, query: QueryComponents, seen_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, avg_top_k]``."""
        return self._by_average(query, seen_ids, self.average, self.avg_top_k)


class MoLCombTopK(_CandidateTopK):
    """Candidates: those of `MoLNaiveTopK` and of `MoLAvgTopK` together."""

    def __init__(
        self, similarity: MoLSimilarity, item_embeddings: torch.Tensor, avg_top_k: int, k_per_group: int
    ) -> None:
        super().__init__(similarity, item_embeddings)
        self.avg_top_k = _positive("avg_top_k", avg_top_k)
        self.k_per_group = _positive("k_per_group", k_per_group)
        self.register_buffer("average", self.item_components.mean(1), persistent=False)
        self.average: torch.Tensor

    def candidates(self, query: QueryComponents, seen_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, Pq * Pi * k_per_group + avg_top_k]``."""
        by_component = self._by_component(query, seen_ids, self.k_per_group)
        by_average = self._by_average(query, seen_ids, self.average, self.avg_top_k)
        return torch.cat([by_component, by_average], dim=1)


class ScoredBruteForceTopK(BruteForceTopK):
    """Exact, for any similarity: scores every item by `Similarity.scores`. item_embeddings: ``[V, D]``."""

    def __init__(self, similarity: Similarity, item_embeddings: torch.Tensor) -> None:
        super().__init__(len(item_embeddings))
        self.similarity = similarity
        self.register_buffer("item_embeddings", item_embeddings.detach(), persistent=False)
        self.item_embeddings: torch.Tensor

    def block_scores(
        self, queries: torch.Tensor, user_ids: torch.Tensor | None
    ) -> Callable[[int, int], torch.Tensor]:
        """Scores by the similarity's own snapshot of each block."""

        def scores(start: int, stop: int) -> torch.Tensor:
            snapshot = self.similarity.snapshot(self.item_embeddings[start:stop])
            return self.similarity.scores(queries, snapshot, user_ids)

        return scores


TopK = BruteForceTopK | _CandidateTopK
_BUILT_IN = (DotProductSimilarity, MoLSimilarity)
"""Similarities that have top-k modules of their own."""


def make_top_k(method: str, similarity: Similarity, item_embeddings: torch.Tensor) -> TopK:
    """The top-k module of a name.

    method: MIPSBruteForceTopK, MoLBruteForceTopK, MoLNaiveTopK5 (k_per_group), MoLAvgTopK500 (avg_top_k) or
        MoLCombTopK5_500 (k_per_group, avg_top_k), with any numbers.
    similarity: what the model was trained with; a method for another kind of similarity is refused.
    item_embeddings: ``[V, D]``, as scored; row i belongs to id i + 1.
    """
    if method == MIPSBruteForceTopK.__name__ and not isinstance(similarity, _BUILT_IN):
        return ScoredBruteForceTopK(similarity, item_embeddings)
    for pattern, fitting, builder in _METHODS:
        match = re.fullmatch(pattern, method)
        if match is None:
            continue
        if not isinstance(similarity, fitting):
            raise UserError(f"top_k_method {method} does not fit {type(similarity).__name__}")
        return builder(similarity, item_embeddings, *map(int, match.groups()))
    names = ", ".join(pattern.replace(r"(\d+)", "<k>") for pattern, _, _ in _METHODS)
    raise UserError(f"top_k_method {method!r} is unknown: use one of {names}")


_METHODS: tuple[tuple[str, type, Callable[..., TopK]], ...] = (
    (
        "MIPSBruteForceTopK",
        DotProductSimilarity,
        lambda similarity, items: MIPSBruteForceTopK(items, similarity.temperature),
    ),
    ("MoLBruteForceTopK", MoLSimilarity, MoLBruteForceTopK),
    (r"MoLNaiveTopK(\d+)", MoLSimilarity, MoLNaiveTopK),
    (r"MoLAvgTopK(\d+)", MoLSimilarity, MoLAvgTopK),
    (r"MoLCombTopK(\d+)_(\d+)", MoLSimilarity, lambda s, items, k, avg: MoLCombTopK(s, items, avg, k)),
)


def _search(
    queries: torch.Tensor, items: torch.Tensor, k: int, seen_ids: torch.Tensor | None
) -> torch.Tensor:
    """``[n, k]`` ids of the best items ``[V, d]`` by dot product, 0 for none."""
    block = max(1, _BLOCK_ELEMENTS // max(1, len(queries)))
    return scan(lambda start, stop: queries @ items[start:stop].T, len(items), k, block, seen_ids)[1]


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name} = {value}: must be at least 1")
    return value
