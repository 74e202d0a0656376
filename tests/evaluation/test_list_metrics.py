"""Metrics of top-k lists against plain loops, definitions and golden numbers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from generative_recommenders.compat.genrec.metrics import RecommendationMetrics
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.list_metrics import (
    ListMetrics,
    accuracy_metrics,
    diversity,
    novelty,
)
from golden_parity import read_golden


def slow_metrics(top: list[int], relevant: list[int], k: int) -> dict[str, float]:
    wanted = {i for i in relevant if i > 0}
    g = max(1, len(wanted))
    hits = [r for r, item in enumerate(top[:k], 1) if item in wanted]
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(g, k) + 1))
    return {
        "recall": len(hits) / g,
        "precision": len(hits) / k,
        "ndcg": sum(1 / math.log2(r + 1) for r in hits) / ideal,
        "map": sum(sum(h <= r for h in hits) / r for r in hits) / min(g, k),
        "mrr": 1 / hits[0] if hits else 0.0,
        "hr": float(bool(hits)),
    }


def slow_diversity(lists: list[list[int]]) -> float:
    distances = []
    for a, b in combinations([{i for i in row if i > 0} for row in lists], 2):
        if a | b:
            distances.append(1 - len(a & b) / len(a | b))
    return float(np.mean(distances)) if distances else 0.0


def random_lists(seed: int, n: int = 25, width: int = 8, items: int = 15):
    """Lists shorter than K, several and no relevant items, repeats among them."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.stack([torch.randperm(items, generator=generator)[:width] + 1 for _ in range(n)])
    for row, length in enumerate(torch.randint(0, width + 1, (n,), generator=generator)):
        top[row, length:] = 0
    relevant = torch.randint(0, items + 1, (n, 6), generator=generator)
    relevant[0] = 0
    seen = torch.randint(0, items + 1, (n, 5), generator=generator)
    return top, relevant, seen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_metrics_equal_a_loop(seed, k):
    top, relevant, seen = random_lists(seed)
    fast = accuracy_metrics(top, relevant, k)
    for row, (a, b) in enumerate(zip(top.tolist(), relevant.tolist())):
        assert {name: float(v[row]) for name, v in fast.items()} == pytest.approx(slow_metrics(a, b, k))
    unseen = [len([i for i in a[:k] if i > 0 and i not in b]) / k for a, b in zip(top.tolist(), seen.tolist())]
    assert novelty(top, seen, k).tolist() == pytest.approx(unseen)


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_diversity_equals_all_pairs(n):
    top, _, _ = random_lists(n + 7, n=max(n, 1))
    top = top[:n]
    assert diversity(top) == pytest.approx(slow_diversity(top.tolist()))


def test_diversity_over_several_blocks(monkeypatch):
    monkeypatch.setattr("generative_recommenders.evaluation.list_metrics._BLOCK_ELEMENTS", 200)
    top, _, _ = random_lists(3, n=40)
    assert diversity(top) == pytest.approx(slow_diversity(top.tolist()))


def test_diversity_of_equal_and_of_disjoint_lists():
    assert diversity(torch.tensor([[1, 2], [2, 1], [1, 2]])) == 0.0
    assert diversity(torch.tensor([[1, 2], [3, 4]])) == 1.0
    assert diversity(torch.zeros(3, 2, dtype=torch.int64)) == 0.0


def test_coverage_and_popularity_bias():
    top, relevant, _ = random_lists(4)
    events = torch.arange(1, 16) ** 2
    metrics = ListMetrics((2, 5), 15, item_counts=events)
    metrics.add(top, relevant)
    result = metrics.compute()
    for k in (2, 5):
        listed = [i for row in top[:, :k].tolist() for i in row if i > 0]
        assert result[f"coverage@{k}"] == len(set(listed)) / 15
        share = sum(float(events[i - 1]) * c for i, c in Counter(listed).items()) / len(listed)
        assert result[f"popularity_bias@{k}"] == pytest.approx(share / float(events.double().mean()))


def test_uniform_lists_have_no_popularity_bias():
    metrics = ListMetrics((3,), 3, item_counts=torch.tensor([9, 1, 2]))
    metrics.add(torch.tensor([[1, 2, 3]]), torch.tensor([[1]]))
    assert metrics.compute()["popularity_bias@3"] == pytest.approx(1.0)


def test_sums_do_not_depend_on_batches_or_processes():
    top, relevant, seen = random_lists(5, n=60)
    whole, first, second = (ListMetrics((1, 5, 8), 15) for _ in range(3))
    whole.add(top, relevant, seen)
    for part in torch.arange(60).split(7):
        target = first if int(part[0]) % 2 else second
        target.add(top[part], relevant[part], seen[part])
    first.sums += second.sums
    first.users += second.users
    first.recommended += second.recommended
    assert first.compute() == whole.compute()


@pytest.mark.parametrize("cutoffs", [[0], [5, 0], [-1], []])
def test_cutoffs_below_one_are_refused(cutoffs):
    with pytest.raises(UserError, match="ListMetrics: cutoffs"):
        ListMetrics(cutoffs, 10)


@pytest.mark.parametrize("item", [-1, 11])
def test_listed_ids_outside_of_the_catalogue_are_refused(item):
    metrics = ListMetrics([2], 10)
    with pytest.raises(UserError, match=f"listed ids .*{item}"):
        metrics.add(torch.tensor([[3, item]]), torch.tensor([[3]]))
    assert int(metrics.users) == 0


def test_no_users():
    assert set(ListMetrics((1, 5), 4).compute().values()) == {0.0}


def golden_inputs():
    """The file counts items from 0 and pads with -1 and -2; here ids start at 1."""
    arrays, meta = read_golden("replay_metrics")
    inputs = {k: (arrays[f"input/{k}"] + 1).clamp(min=0) for k in ("predictions", "ground_truth", "train")}
    outputs = {k.removeprefix("output/"): v for k, v in arrays.items() if k.startswith("output/")}
    return meta["config"], inputs, outputs


def test_golden_means():
    config, inputs, outputs = golden_inputs()
    trained = inputs["train"].unique()[1:]  # the file's coverage is a share of the items of training
    metrics = ListMetrics(config["ks"], config["V"])
    for part in torch.arange(len(inputs["train"])).split(4):
        metrics.add(*(inputs[name][part] for name in ("predictions", "ground_truth", "train")))
    metrics.recommended[:, ~torch.isin(torch.arange(config["V"] + 1), trained)] = 0
    result = metrics.compute(catalogue_size=len(trained))
    expected = {name.removeprefix("mean/"): float(v) for name, v in outputs.items() if name.startswith("mean/")}
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_golden_users():
    config, inputs, outputs = golden_inputs()
    for k in config["ks"]:
        values = accuracy_metrics(inputs["predictions"], inputs["ground_truth"], k)
        values["novelty"] = novelty(inputs["predictions"], inputs["train"], k)
        for name in values.keys() - {"hr"}:
            assert values[name].tolist() == pytest.approx(outputs[f"user/{name}@{k}"].tolist(), abs=1e-6)


def python_lists(seed: int):
    rng = np.random.default_rng(seed)
    predictions = [rng.permutation(20)[: rng.integers(0, 9)].tolist() for _ in range(30)]
    targets = [rng.integers(0, 20, rng.integers(0, 6)).tolist() for _ in range(30)]
    return predictions, targets


@pytest.mark.parametrize("k", [1, 4, 50])
def test_list_functions_equal_their_definitions(k):
    predictions, targets = python_lists(k)
    users = [(p[:k], t) for p, t in zip(predictions, targets) if t]
    recall = np.mean([len(set(p) & set(t)) / len(set(t)) for p, t in users])
    hits = np.mean([bool(set(p) & set(t)) for p, t in users])
    precision = np.mean([len(set(p[:k]) & set(t)) / k for p, t in zip(predictions, targets)])
    assert RecommendationMetrics.recall_at_k(predictions, targets, k) == pytest.approx(recall)
    assert RecommendationMetrics.hit_rate_at_k(predictions, targets, k) == pytest.approx(hits)
    assert RecommendationMetrics.precision_at_k(predictions, targets, k) == pytest.approx(precision)
    gains = []
    for p, t in users:
        dcg = sum(1 / math.log2(r + 1) for r, item in enumerate(p, 1) if item in t)
        gains.append(dcg / sum(1 / math.log2(r + 1) for r in range(1, min(len(t), k) + 1)))
    assert RecommendationMetrics.ndcg_at_k(predictions, targets, k) == pytest.approx(np.mean(gains))


def test_list_functions_documented_example():
    predictions = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    targets = [[1, 3, 5], [7, 9]]
    assert RecommendationMetrics.recall_at_k(predictions, targets, 5) == 1.0
    assert RecommendationMetrics.hit_rate_at_k(predictions, targets, 5) == 1.0
    assert 0 < RecommendationMetrics.ndcg_at_k(predictions, targets, 5) < 1
    assert RecommendationMetrics.coverage(predictions, 20) == 0.5
    assert RecommendationMetrics.diversity(predictions) == 1.0


def test_list_diversity_and_empty_input():
    predictions, _ = python_lists(9)
    shifted = [[i + 1 for i in row] for row in predictions]
    assert RecommendationMetrics.diversity(predictions) == pytest.approx(slow_diversity(shifted))
    assert RecommendationMetrics.diversity([]) == RecommendationMetrics.diversity([[1]]) == 0.0
    assert RecommendationMetrics.recall_at_k([[1]], [[]], 1) == 0.0
    assert RecommendationMetrics.precision_at_k([[1]], [[1]], 0) == 0.0
