"""Conditions of the numbers: what became of targets that repeat or are unseen, and whether there is anything to
measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import logging

from generative_recommenders.build.parts import build_model
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.evaluator import EvaluationResult
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.training.trainer import Trainer
from tiny_data import tiny_dataset
from tiny_models import catalogue, settings

TOWER = {"main_module": "TwoTower", "item_tower.query_module": "HSTU"}


def evaluation(dataset: SequenceDataset, **choices: object) -> ModelEvaluation:
    chosen = settings(**choices)
    return ModelEvaluation(chosen, dataset, make_split(dataset, chosen.data.protocol), Collectives())


@pytest.mark.parametrize(
    ("choices", "times", "shown_time"),
    [
        ({"main_module": "SASRec"}, True, False),
        ({"main_module": "HSTU"}, True, True),
        ({"main_module": "HSTU"}, False, False),
        ({"main_module": "HSTU", "hstu.enable_relative_time_bias": False}, True, False),
        ({"main_module": "HSTU", "hstu.enable_relative_attention_bias": False}, True, False),
        (TOWER, True, True),
    ],
)
def test_next_time_is_shown_where_the_encoder_sees_times(
    ragged_dataset: SequenceDataset, choices: dict[str, object], times: bool, shown_time: bool
) -> None:
    data = ragged_dataset if times else dataclasses.replace(ragged_dataset, timestamps=None)
    result = EvaluationResult(RankHistogram(30), torch.zeros(data.num_users, dtype=torch.int64))
    shown = evaluation(data, **choices, next_time="hidden").conditions(result)
    assert shown.endswith(", next_time 'hidden'") == shown_time


def test_repeated_and_unseen_targets_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four targets one repeats and one occurs nowhere in training."""
    dataset = tiny_dataset(tmp_path, [[1, 2, 3, 1], [2, 3, 1, 4], [3, 1, 2, 3, 5], [4, 3, 4, 1, 2, 3, 6]])
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    model = build_model(settings(), catalogue(num_items=dataset.num_items))
    for protocol, misses in (("leave_one_out", 1 + 2), ("paper", 1)):
        measured = evaluation(dataset, protocol=protocol)
        result = measured.test(model)
        told = measured.conditions(result)
        assert "seen filter 'history' (targets among the seen items, misses: 1 of 4)" in told
        assert f"targets unseen in training, {'as scored' if protocol == 'paper' else 'misses'}: 2" in told
        assert int(result.histogram.counts[0, -1]) == misses
        measured.test(model)
    assert len(warnings) == 2 and "25.0 % of the targets" in warnings[0] and 'seen_filter = "none"' in warnings[0]
    without = evaluation(dataset, seen_filter="none")
    for user in range(4):  # a sample has its own targets
        ranks = torch.zeros(4, dtype=torch.int64)
        ranks[user] = 1
        told = without.conditions(EvaluationResult(RankHistogram(6), ranks))
        assert f"misses: {int(without.split.unseen_test_targets[user])}" in told
    assert without.conditions(without.test(model)).startswith(
        "seen filter 'none', targets unseen in training, misses: 2"
    )
    assert len(warnings) == 2


def test_baselines_are_measured_under_the_same_conditions(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2, 3, 1], [2, 3, 1, 4], [3, 1, 2, 4]])
    assert evaluation(dataset, seen_filter="history").baselines()["most popular"]["hr@1"] == 0.0
    paper = evaluation(dataset, seen_filter="none", protocol="paper").baselines()
    assert paper["most popular"]["hr@10"] == 1.0


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2], [2, 1], [1, 2]])
    for make in (ModelEvaluation, Trainer):
        with pytest.raises(
            UserError, match="no test targets under protocol 'leave_one_out': its longest history has 2"
        ):
            make(settings(), dataset, make_split(dataset), Collectives())
    dataset = tiny_dataset(tmp_path / "long", [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]])
    no_validation = dataclasses.replace(make_split(dataset), validation_targets=np.full(3, -1, np.int32))
    with pytest.raises(UserError, match="no validation targets .*early_stopping_patience needs"):
        Trainer(settings(early_stopping_patience=2), dataset, no_validation, Collectives())


def test_an_unknown_filter_lists_all_and_the_nearest(ragged_dataset: SequenceDataset) -> None:
    with pytest.raises(
        UserError, match=r"unknown seen filter 'histroy' \(train_fn.seen_filter\); did you mean 'history'"
    ):
        evaluation(ragged_dataset, seen_filter="histroy")
