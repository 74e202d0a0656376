"""Stopped evaluations, resumed to the same numbers, and only with the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from generative_recommenders.build.model import build_model
from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.signals import StopRequested
from generative_recommenders.evaluation import evaluator, model_evaluation, progress
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.modeling.model import SequenceRecommender
from tiny_models import catalogue, settings

BATCH = 4


@pytest.fixture
def scene(
    ragged_dataset: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModelEvaluation, SequenceRecommender]:
    monkeypatch.setattr(evaluator, "USERS", 6)  # no multiple of a batch
    chosen = settings(main_module="SASRec", eval_batch_size=BATCH, checkpoint_minutes=1e-9)
    evaluation = ModelEvaluation(chosen, ragged_dataset, make_split(ragged_dataset), Collectives())
    evaluation.folder = tmp_path / "run"
    evaluation.folder.mkdir()
    torch.manual_seed(0)
    return evaluation, build_model(chosen, catalogue(num_items=ragged_dataset.num_items)).eval()


def stop_after(calls: int):
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > calls

    return stop


def encoded_users(model: SequenceRecommender, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = model.encode_query

    def counting(batch, *arguments):
        counts.append(len(batch["lengths"]))
        return original(batch, *arguments)

    monkeypatch.setattr(model, "encode_query", counting)
    return counts


def test_a_stopped_evaluation_resumes_to_the_same_numbers(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, model = scene
    expected = evaluation.test(model)
    assert list(evaluation.folder.iterdir()) == []
    model.train()
    with pytest.raises(StopRequested):
        evaluation.test(model, stop_after(3))
    assert model.training  # as before, so that who goes on training has dropout
    assert len(list(evaluation.folder.iterdir())) == 1
    counts = encoded_users(model, monkeypatch)
    result = evaluation.test(model)
    assert torch.equal(result.ranks, expected.ranks)
    assert torch.equal(result.histogram.counts, expected.histogram.counts)
    assert result.removed_targets == expected.removed_targets > 0
    assert 0 < sum(counts) <= expected.targets - 3 * 6 + BATCH
    assert list(evaluation.folder.iterdir()) == []


def test_the_bar_of_a_resumed_evaluation_begins_where_it_was(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, model = scene
    with pytest.raises(StopRequested):
        evaluation.test(model, stop_after(3))
    bars: list[tuple[int, int, int]] = []

    def recorded(loader: EvaluationLoader, total: int, description: str, done: int, shown: bool):
        bars.append((len(loader), total, done))
        return iter(loader)

    monkeypatch.setattr(model_evaluation, "progress_bar", recorded)
    evaluation.test(model)
    ((left, total, done),) = bars
    assert done > 0 and left + done == total


def test_the_file_is_written_at_least_every_ten_minutes(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    seldom, model = scene
    chosen = settings(main_module="SASRec", eval_batch_size=BATCH, checkpoint_minutes=1000)
    evaluation = ModelEvaluation(chosen, seldom.dataset, seldom.split, Collectives())
    evaluation.folder = seldom.folder
    monkeypatch.setattr(progress, "perf_counter", itertools.count(0, 301).__next__)  # seconds from one look to the next
    written: list[int] = []
    monkeypatch.setattr(progress.EvaluationProgress, "save", lambda self, ranks: written.append(int((ranks > 0).sum())))
    result = evaluation.test(model)
    assert written and written[0] < result.targets


def test_the_file_of_a_killed_evaluation_is_taken_too(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, model = scene
    expected = evaluation.test(model)
    calls: list[int] = []
    original = evaluator.product_ranks

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError
        return original(*arguments, **options)

    monkeypatch.setattr(evaluator, "product_ranks", failing)
    with pytest.raises(MemoryError):
        evaluation.test(model)
    monkeypatch.setattr(evaluator, "product_ranks", original)
    counts = encoded_users(model, monkeypatch)
    assert torch.equal(evaluation.test(model).ranks, expected.ranks)
    assert sum(counts) < expected.targets


@pytest.mark.parametrize("what", ["weights", "part", "damaged"])
def test_other_ranks_are_not_taken(scene, what: str, caplog: pytest.LogCaptureFixture) -> None:
    evaluation, model = scene
    with pytest.raises(StopRequested):
        evaluation.test(model, stop_after(2))
    (file,) = evaluation.folder.iterdir()
    if what == "weights":
        with torch.no_grad():
            model.items.table.neg_()
    if what == "damaged":
        file.write_bytes(file.read_bytes()[:40])
    evaluate = evaluation.validation if what == "part" else evaluation.test
    alone = ModelEvaluation(evaluation.settings, evaluation.dataset, evaluation.split, Collectives())
    fresh = (alone.validation if what == "part" else alone.test)(model)
    assert torch.equal(evaluate(model).ranks, fresh.ranks)
    assert ("cannot be read" in caplog.text) == (what == "damaged")


def test_a_folder_that_cannot_be_written_to_is_warned_of(scene, caplog: pytest.LogCaptureFixture) -> None:
    evaluation, model = scene
    evaluation.folder = evaluation.folder / "file"
    evaluation.folder.write_text("")
    with pytest.raises(StopRequested):
        evaluation.test(model, stop_after(2))
    assert "its ranks cannot be saved" in caplog.text
