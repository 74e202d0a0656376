"""Metrics against a few sampled candidates, for comparison with papers that report nothing else.

They are far above the same metrics over the whole catalogue and may order models differently (Krichene and
Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020). Every name here has
"sampled" in it, and computing them warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.metrics import RankHistogram


class NotComparableWarning(UserWarning):
    """Sampled-candidate metrics are not comparable with metrics over the full catalogue."""


def draw_sampled_candidates(
    target_ids: torch.Tensor,
    seen_ids: torch.Tensor,
    num_items: int,
    num_candidates: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """``[n, R]`` int64: R different items a row, uniform over those that are neither seen nor the target.

    target_ids: ``[n]``; seen_ids: ``[n, S]``, padded with 0. Raises UserError where a row has fewer than R
    such items. Work is O(n V), in memory one row's ``[V]``.
    """
    rows = []
    for target, seen in zip(target_ids, seen_ids):
        free = torch.ones(num_items + 1, dtype=torch.bool)
        free[seen.cpu()] = False
        free[[0, int(target)]] = False
        pool = free.nonzero()[:, 0]
        if len(pool) < num_candidates:
            raise UserError(
                f"num_candidates: {num_candidates} asked, {len(pool)} unseen items left; ask for fewer"
            )
        rows.append(pool[torch.randperm(len(pool), generator=generator)[:num_candidates]])
    return torch.stack(rows).to(target_ids.device) if rows else seen_ids.new_zeros(0, num_candidates)


def sampled_ranks(
    target_scores: torch.Tensor,
    candidate_scores: torch.Tensor,
    target_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
) -> torch.Tensor:
    """``[n]`` int64 in 1..R + 1: 1 + candidates scored better + those scored the same with a smaller id.

    target_scores, target_ids: ``[n]``; candidate_scores, candidate_ids: ``[n, R]``, without the target. A
    target scored NaN is last.
    """
    own = target_scores[:, None]
    ahead = (candidate_scores > own) | ((candidate_scores == own) & (candidate_ids < target_ids[:, None]))
    return 1 + (ahead | own.isnan()).sum(1)


def sampled_candidate_metrics(
    ranks: torch.Tensor, num_candidates: int, cutoffs: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """``sampled{R}_hr@K``, ``sampled{R}_ndcg@K``, ``sampled{R}_mrr`` of `sampled_ranks` ``[n]``; warns."""
    warnings.warn(
        f"metrics against {num_candidates} sampled candidates are not comparable with the full catalogue",
        NotComparableWarning,
        stacklevel=2,
    )
    histogram = RankHistogram(num_candidates + 1)
    histogram.add(ranks)
    return {f"sampled{num_candidates}_{name}": value for name, value in histogram.compute(cutoffs).items()}
