from __future__ import annotations

import math

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.sampled_candidates import (
    NotComparableWarning,
    draw_sampled_candidates,
    sampled_candidate_metrics,
    sampled_ranks,
)


def test_metrics_say_that_they_are_sampled_and_warn():
    with pytest.warns(NotComparableWarning, match="not comparable"):
        metrics = sampled_candidate_metrics(torch.tensor([1, 3, 12]), 11, (2, 50))
    assert all(name.startswith("sampled11_") for name in metrics)
    assert metrics["sampled11_hr@2"] == pytest.approx(1 / 3)
    assert metrics["sampled11_hr@50"] == 1.0
    assert metrics["sampled11_ndcg@2"] == pytest.approx(1 / 3)
    assert metrics["sampled11_ndcg@50"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(13)) / 3)
    assert metrics["sampled11_mrr"] == pytest.approx((1 + 1 / 3 + 1 / 12) / 3)


def test_all_items_as_candidates_give_the_exact_rank():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (20, 9), generator=generator).float()
    targets = torch.randint(1, 10, (20,), generator=generator)
    candidates = draw_sampled_candidates(targets, torch.zeros(20, 1).long(), 9, 8, generator)
    own = scores.gather(1, targets[:, None] - 1)[:, 0]
    ranks = sampled_ranks(own, scores.gather(1, candidates - 1), targets, candidates)
    assert torch.equal(ranks, exact_ranks(scores, targets))


def test_a_nan_target_is_last():
    nan = torch.tensor([float("nan")])
    assert sampled_ranks(nan, torch.zeros(1, 4), torch.tensor([1]), torch.arange(2, 6)[None]).tolist() == [5]


def test_candidates_are_different_unseen_and_evenly_drawn():
    targets, seen = torch.tensor([2]).repeat(3000), torch.tensor([[1, 4, 0]]).repeat(3000, 1)
    drawn = draw_sampled_candidates(targets, seen, 8, 2, torch.Generator().manual_seed(3))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert counts[[0, 1, 2, 4]].sum() == 0
    assert (counts[[3, 5, 6, 7, 8]] - 1200).abs().max() < 150


def test_too_few_unseen_items_are_refused():
    with pytest.raises(UserError, match="num_candidates"):
        draw_sampled_candidates(torch.tensor([1]), torch.tensor([[2, 3]]), 4, 2, torch.Generator())
