"""Evaluation of a random sample of users, and its standard error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from generative_recommenders.build.model import build_model
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation, of_sample
from tiny_models import catalogue, settings


def evaluate(dataset: SequenceDataset, **chosen):
    made = settings(main_module="SASRec", **chosen)
    evaluation = ModelEvaluation(made, dataset, make_split(dataset), Collectives())
    torch.manual_seed(0)
    model = build_model(made, catalogue(num_items=dataset.num_items)).eval()
    return evaluation, evaluation.test(model)


def test_the_users_of_a_sample_have_the_ranks_of_all(ragged_dataset: SequenceDataset) -> None:
    _, everyone = evaluate(ragged_dataset)
    evaluation, result = evaluate(ragged_dataset, eval_users=20)
    chosen = result.ranks > 0
    assert result.targets == int(chosen.sum()) == 20 < everyone.targets
    assert torch.equal(result.ranks[chosen], everyone.ranks[chosen])
    _, other = evaluate(ragged_dataset, eval_users=20, random_seed=7)
    assert not torch.equal(other.ranks > 0, chosen)
    ((name, errors),) = evaluation.standard_error_row(result).items()
    assert name == f"standard error, 20 of {everyone.targets} users"
    assert errors == evaluation.standard_errors(result) and errors["ndcg@10"] > 0
    assert f"a sample of 20 of {everyone.targets} users" in evaluation.conditions(result)
    baseline = evaluation.baselines()["most popular"]
    assert round(baseline["hr@10"] * 20, 9).is_integer()


def test_all_users_have_no_standard_error(ragged_dataset: SequenceDataset) -> None:
    evaluation, result = evaluate(ragged_dataset, eval_users=10_000)
    assert evaluation.standard_errors(result) == evaluation.standard_error_row(result) == {}
    assert "sample" not in evaluation.conditions(result)


def test_a_larger_sample_holds_the_smaller_one() -> None:
    targets = np.where(np.arange(50) % 3, 4, -1)
    small, large = (of_sample(targets, n, 5) >= 0 for n in (6, 12))
    assert small.sum() == 6 and large.sum() == 12 and not (small & ~large).any()
    assert (targets[large] >= 0).all()
    assert np.array_equal(of_sample(targets, 1000, 5), targets)


def test_the_standard_error_is_that_of_means_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    population = torch.randint(1, 102, (400,), generator=generator) ** 2 // 100 + 1

    def histogram(ranks: torch.Tensor) -> RankHistogram:
        made = RankHistogram(103)
        made.add(ranks)
        return made

    means, errors = [], []
    for _ in range(1000):
        sample = histogram(population[torch.randperm(400, generator=generator)[:100]])
        means.append(sample.compute())
        errors.append(sample.standard_errors(400))
    for name in ("hr@1", "ndcg@10", "hr@50", "mrr", "mrr@2500"):
        spread = float(np.std([each[name] for each in means]))
        expected = math.sqrt(float(np.mean([each[name] ** 2 for each in errors])))
        assert spread == pytest.approx(expected, rel=0.08)
    assert histogram(population).standard_errors(400)["mrr"] == 0.0
    assert histogram(population[:1]).standard_errors(400)["mrr"] == 0.0
    assert set(histogram(population).standard_errors(400)) == set(histogram(population).compute())
