"""HR@K, NDCG@K and MRR from an integer histogram of exact ranks.

Histograms are added, metrics computed once: batches, processes and their order change no digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CUTOFFS = (1, 10, 50, 100, 200, 500, 1000)
"""The K of HR@K and NDCG@K that are reported by default."""
PUBLISHED_DEPTH = 2500
"""Ranks that the HSTU authors' evaluation looks at: whatever lies beyond is rank 2,501 to it."""


def current_name(metric: str) -> str:
    """Today's name of a metric in the records of an old run: release 0.1.0 wrote ``liked_hr@10``."""
    return metric.replace("liked_", "high_rated_", 1) if metric.startswith("liked_") else metric


class RankHistogram:
    """Number of targets at each rank, for all targets and for a subset (those rated 4 and above, say).

    num_items: V. Ranks are 1..V; V + 1 stands for a miss (`ranks.exact_ranks`) and is no hit at any cutoff.

    Attributes:
        counts: ``[2, V + 1]`` int64; row 0 all targets, row 1 the subset; column r - 1 is rank r. Processes
            add theirs up with one sum over this tensor.
    """

    def __init__(self, num_items: int) -> None:
        self.counts = torch.zeros(2, num_items + 1, dtype=torch.int64)

    def add(self, ranks: torch.Tensor, subset: torch.Tensor | None = None) -> None:
        """Count ranks ``[n]`` int64 in 1..V + 1; subset ``[n]`` bool: which also count in row 1."""
        self.counts[0].index_add_(0, ranks - 1, torch.ones_like(ranks))
        if subset is not None:
            self.counts[1].index_add_(0, ranks[subset] - 1, torch.ones_like(ranks[subset]))

    def total(self, subset: bool = False) -> int:
        """Targets counted so far."""
        return int(self.counts[int(subset)].sum())

    def compute(self, cutoffs: Sequence[int] = CUTOFFS, subset: bool = False) -> dict[str, float]:
        """``hr@K``, ``ndcg@K`` for each cutoff, then ``mrr`` and ``mrr@2500``; means over targets in float64, 0.0
        without targets.

        One relevant item a user, so HR@K = mean [rank <= K], NDCG@K = mean [rank <= K] / log2(rank + 1) and
        MRR = mean 1 / rank, without a cutoff and with rank V + 1 for a miss. ``mrr@2500`` is what the HSTU authors'
        evaluation calls MRR: a rank beyond `PUBLISHED_DEPTH`, as a miss is, counts as `PUBLISHED_DEPTH` + 1.
        """
        counts = self.counts[int(subset)]
        total = max(int(counts.sum()), 1)
        # Counts are summed first and divided last, so that the digits do not depend on the order of users.
        discounts = self._discounts(cutoffs).items()
        return {name: float((counts[: len(by)] / by).sum()) / total for name, by in discounts}

    def standard_errors(self, population: int) -> dict[str, float]:
        """Standard errors of `compute`'s means, where the targets are a random sample of ``population`` ones, drawn
        without
        replacement: ``sqrt(s^2 / n (1 - n / N))`` with the sample's variance s^2."""
        counts, total = self.counts[0].double(), self.total()
        left = max(0.0, 1 - total / max(population, 1)) / max(total, 1)
        errors: dict[str, float] = {}
        for name, by in self._discounts(CUTOFFS).items():
            some, gains = counts[: len(by)], 1 / by
            mean = (some * gains).sum() / max(total, 1)
            squares = (some * gains.square()).sum() / max(total - 1, 1)
            variance = squares - mean.square() * total / max(total - 1, 1)
            errors[name] = math.sqrt(max(float(variance), 0.0) * left)
        return errors

    def _discounts(self, cutoffs: Sequence[int]) -> dict[str, torch.Tensor]:
        """By metric, what a hit at rank 1, 2, ... is divided by, float64; ranks past the last of these count
        nothing."""
        num_items = self.counts.shape[1] - 1
        ranks = torch.arange(1, num_items + 2, dtype=torch.float64)
        discounts: dict[str, torch.Tensor] = {}
        for k in cutoffs:
            first = ranks[: min(k, num_items)]
            discounts |= {f"hr@{k}": torch.ones_like(first), f"ndcg@{k}": torch.log2(first + 1)}
        # A miss, rank V + 1, lies beyond whatever the published evaluation looks at.
        seen_ranks = torch.cat([ranks[:-1], ranks.new_tensor([math.inf])]).clamp(max=PUBLISHED_DEPTH + 1)
        return {**discounts, "mrr": ranks, f"mrr@{PUBLISHED_DEPTH}": seen_ranks}
