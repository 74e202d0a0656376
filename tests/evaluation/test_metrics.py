"""Ranking metrics of rank histograms against a loop over users and golden numbers."""

from __future__ import annotations

import math

import pytest
import torch

from generative_recommenders.evaluation.metrics import CUTOFFS, RankHistogram
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems
from golden_parity import read_golden

PUBLISHED_CUT = 2500


def slow_metrics(ranks: list[int], num_items: int, cutoffs) -> dict[str, float]:
    result = {}
    for k in cutoffs:
        hits = [r for r in ranks if r <= k and r <= num_items]
        result[f"hr@{k}"] = len(hits) / len(ranks)
        result[f"ndcg@{k}"] = sum(1 / math.log2(r + 1) for r in hits) / len(ranks)
    result["mrr"] = sum(1 / r for r in ranks) / len(ranks)
    result["mrr@2500"] = sum(1 / (r if r <= min(2500, num_items) else 2501) for r in ranks) / len(ranks)
    return result


@pytest.mark.parametrize("num_items", [3, 90, 1000, 6000])
def test_metrics_equal_a_loop_over_users(num_items):
    ranks = torch.randint(1, num_items + 2, (200,), generator=torch.Generator().manual_seed(num_items))
    histogram = RankHistogram(num_items)
    for part in ranks.split(33):
        histogram.add(part)
    expected = slow_metrics(ranks.tolist(), num_items, CUTOFFS)
    assert histogram.compute() == pytest.approx(expected, abs=1e-12)
    assert list(histogram.compute()) == list(expected)
    assert histogram.total() == 200


def test_a_miss_is_no_hit_even_where_k_exceeds_the_catalogue():
    histogram = RankHistogram(4)
    histogram.add(torch.tensor([5, 4]))
    metrics = histogram.compute((4, 500))
    assert metrics["hr@4"] == metrics["hr@500"] == 0.5
    assert metrics["ndcg@500"] == pytest.approx(0.5 / math.log2(5))


def test_a_subset_counts_apart():
    ranks, subset = torch.tensor([1, 2, 7, 9]), torch.tensor([False, True, True, False])
    histogram = RankHistogram(10)
    histogram.add(ranks, subset)
    assert histogram.total(subset=True) == 2
    assert histogram.compute((5,), subset=True) == pytest.approx(slow_metrics([2, 7], 10, (5,)))
    assert histogram.compute((5,)) == pytest.approx(slow_metrics([1, 2, 7, 9], 10, (5,)))


def test_sums_of_two_processes_equal_one_to_the_last_digit():
    ranks = torch.randint(1, 52, (101,), generator=torch.Generator().manual_seed(2))
    whole, first, second = RankHistogram(50), RankHistogram(50), RankHistogram(50)
    whole.add(ranks)
    first.add(ranks[1::2])
    second.add(ranks[::2])
    first.counts += second.counts
    assert first.compute() == whole.compute()


def test_without_targets_every_metric_is_zero():
    assert set(RankHistogram(5).compute().values()) == {0.0}


def golden_ranks(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ranks with the published window filter and its cut: candidate i of the file is item i + 1 of the score
    matrix.
    """
    ids = arrays["input/candidate_ids"]
    column_of = torch.zeros(int(ids.max()) + 1, dtype=torch.int64)
    column_of[ids] = torch.arange(1, len(ids) + 1)
    items = arrays["input/candidate_embeddings"].reshape(len(ids), -1)
    items = items / items.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    seen = SeenItems.padded(column_of[arrays["input/past_ids"]], len(ids))
    targets = column_of[arrays["input/target_ids"].flatten()]
    return exact_ranks(arrays["input/query"] @ items.T, targets, seen).clamp(max=PUBLISHED_CUT + 1)


def test_golden_ranks_and_metrics():
    arrays, _ = read_golden("meta_eval_metrics")
    ranks = golden_ranks(arrays)
    assert ranks.tolist() == arrays["output/rank"].tolist()
    for name, values in arrays.items():
        metric, _, cutoff = name.removeprefix("output/").partition("@")
        if metric in ("hr", "ndcg", "mrr"):
            key = f"{metric}@{cutoff}" if cutoff else metric
            assert user_values(ranks, key) == pytest.approx(values.double().tolist(), abs=1e-5), key


def user_values(ranks: torch.Tensor, key: str) -> list[float]:
    """One histogram a user, over the published cut of the candidates."""
    values = []
    for rank in ranks:
        histogram = RankHistogram(PUBLISHED_CUT)
        histogram.add(rank[None])
        values.append(histogram.compute((int(key.split("@")[1]),) if "@" in key else ())[key])
    return values


def test_golden_file_has_repeated_targets():
    arrays, _ = read_golden("meta_eval_metrics")
    repeated = (arrays["input/past_ids"] == arrays["input/target_ids"].reshape(-1, 1)).any(1)
    assert repeated.any()
    assert (golden_ranks(arrays)[repeated] == PUBLISHED_CUT + 1).all()
