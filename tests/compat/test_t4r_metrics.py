"""Transformers4Rec's ranking metrics against a plain loop and golden numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from generative_recommenders.compat.transformers4rec.metrics import (
    AvgPrecisionAt,
    DCGAt,
    MeanRecipricolRankAt,
    MeanReciprocalRankAt,
    NDCGAt,
    PrecisionAt,
    RankingMetric,
    RecallAt,
)
from generative_recommenders.errors import UserError
from golden_parity import read_golden
from memory import LargestTensor
from programs import quick_start

METRICS: dict[str, type[RankingMetric]] = {
    "precision": PrecisionAt,
    "recall": RecallAt,
    "avg_precision": AvgPrecisionAt,
    "dcg": DCGAt,
    "ndcg": NDCGAt,
    "mrr": MeanReciprocalRankAt,
}


def slow_row(scores: list[float], labels: list[float], k: int, deepest: int) -> dict[str, float]:
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], c))
    found = [labels[c] for c in order[:deepest]]
    found += [0.0] * (deepest - len(found))
    ranks = [r for r in range(1, k + 1) if found[r - 1]]
    best = sorted(found, reverse=True)[:k]
    ideal = sum(h / math.log2(r + 1) for r, h in enumerate(best, 1))
    dcg = sum(1 / math.log2(r + 1) for r in ranks)
    return {
        "precision": len(ranks) / k,
        "recall": len(ranks) / sum(labels) if sum(labels) else 0.0,
        "avg_precision": sum(sum(h <= r for h in ranks) / r for r in ranks) / min(max(sum(labels), 1), k),
        "dcg": dcg,
        "ndcg": dcg / ideal if ideal else 0.0,
        "mrr": 1 / ranks[0] if ranks else 0.0,
    }


def random_case(seed: int, n: int = 30, columns: int = 12):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (n, columns), generator=generator).float()
    labels = (torch.rand(n, columns, generator=generator) < 0.25).float()
    labels[0] = 0
    return scores, labels


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("top_ks", [[1, 3], [2, 12, 40]])
def test_metrics_equal_a_loop_with_ties_and_large_k(name, top_ks):
    scores, labels = random_case(len(top_ks))
    metric = METRICS[name](top_ks)
    metric.update(scores[:11], labels[:11])
    metric.update(scores[11:], labels[11:])
    rows = list(zip(scores.tolist(), labels.tolist()))
    expected = [np.mean([slow_row(s, y, k, max(top_ks))[name] for s, y in rows]) for k in top_ks]
    assert metric.compute().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_column_numbers_equal_one_hot_labels(name):
    scores, _ = random_case(1)
    target = torch.arange(30) % 12
    by_id, by_label = METRICS[name]([1, 4], labels_onehot=True), METRICS[name]([1, 4])
    by_id.update(scores.view(5, 6, 12), target.view(5, 6))
    by_label.update(scores, torch.eye(12)[target])
    assert torch.equal(by_id.compute(), by_label.compute())


@pytest.mark.parametrize("name", METRICS)
def test_column_numbers_take_no_row_of_labels(name):
    """Nothing of an update is larger than the scores of a row times rows, in bytes."""
    scores, metric = torch.rand(40, 500), METRICS[name]([1, 4], labels_onehot=True)
    with LargestTensor() as largest:
        metric.update(scores, torch.arange(40))
    assert largest.nbytes <= scores.numel() * scores.element_size()


def test_default_cutoffs_without_rows():
    assert MeanRecipricolRankAt is MeanReciprocalRankAt
    assert RecallAt().top_ks == [2, 5]
    empty = RecallAt()
    empty.update(torch.zeros(0, 4), torch.zeros(0, 4))
    assert empty.compute().tolist() == [0.0, 0.0]


def test_reset_forgets():
    scores, labels = random_case(2)
    metric = RecallAt([3])
    metric.update(scores, labels)
    metric.reset()
    metric.update(scores[:1], labels[:1])
    assert float(metric.compute()) == 0.0


@pytest.mark.parametrize(
    "onehot, target",
    [
        (True, torch.tensor([12])),
        (True, torch.tensor([-1])),
        (True, torch.tensor([3, 4])),
        (False, torch.tensor([[1.0]])),
        (False, torch.tensor(3)),
        (False, torch.zeros(1, 0)),
        (False, torch.zeros(2, 12)),
    ],
)
def test_targets_that_do_not_fit_are_refused(onehot, target):
    with pytest.raises(UserError, match="target"):
        RecallAt([1], labels_onehot=onehot).update(torch.rand(1, 12), target)


@pytest.mark.parametrize("top_ks", [[0, 5], [], 5, [2.5], ["5"]])
def test_cutoffs_that_are_no_list_of_whole_numbers_are_refused(top_ks):
    with pytest.raises(UserError, match="top_ks"):
        RecallAt(top_ks=top_ks)


@pytest.mark.parametrize("name", METRICS)
def test_scores_without_columns_are_refused(name):
    with pytest.raises(UserError, match="preds"):
        METRICS[name]().update(torch.zeros(3, 0), torch.zeros(3, 0))
    with pytest.raises(UserError, match="preds"):
        METRICS[name]().update(torch.tensor(1.0), torch.tensor(1.0))


def golden_case():
    arrays, meta = read_golden("t4r_ranking_metrics")
    return arrays, meta["config"]


@pytest.mark.parametrize("name", METRICS)
def test_golden(name):
    arrays, config = golden_case()
    scores, ids, multi = (arrays[f"input/{key}"] for key in ("scores", "label_ids", "multi_hot"))
    single = torch.eye(scores.shape[1])[ids]
    for kind, labels in (("single", single), ("multi", multi)):
        metric = METRICS[name](config["top_ks"])
        rows = metric.rows(scores, labels).float()
        torch.testing.assert_close(rows, arrays[f"output/per_row/{kind}/{name}"], atol=1e-5, rtol=1e-5)
        metric.update(scores, labels)
        torch.testing.assert_close(metric.compute(), arrays[f"output/mean/{kind}/{name}"], atol=1e-5, rtol=1e-5)
    by_id = METRICS[name](config["top_ks"], labels_onehot=True)
    by_id.update(scores, ids)
    torch.testing.assert_close(by_id.compute(), arrays[f"output/mean/single_ids/{name}"], atol=1e-5, rtol=1e-5)


def test_golden_ndcg_depends_on_the_largest_cutoff():
    arrays, _ = golden_case()
    rows = NDCGAt([1, 2]).rows(arrays["input/scores"], arrays["input/multi_hot"])
    expected = arrays["output/per_row/multi/ndcg_only_ks_1_2"]
    torch.testing.assert_close(rows.float(), expected, atol=1e-5, rtol=1e-5)


def _one_process(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    scores, labels = random_case(3)
    mine = slice(0, 7) if rank == 0 else slice(7, 30)
    metric = RecallAt([2, 5])
    metric.update(scores[mine], labels[mine])
    torch.save(metric.compute(), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_unequal_shares_give_the_mean_over_all_rows(tmp_path):
    arguments = str(tmp_path / "store"), str(tmp_path)
    members = [quick_start().Process(target=_one_process, args=(rank, *arguments)) for rank in range(2)]
    for each in members:
        each.start()
    for each in members:
        each.join(timeout=60)
    assert [each.exitcode for each in members] == [0, 0]
    scores, labels = random_case(3)
    whole = RecallAt([2, 5])
    whole.update(scores, labels)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result, whole.compute(), atol=1e-7, rtol=0)
