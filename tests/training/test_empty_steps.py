"""A step in which no target counts: nothing moves, and the run continues as if it had not been but for its number."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from absl import logging

from generative_recommenders.config.registry import OPTIMIZERS
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.training.optimizers import Optimizer
from generative_recommenders.training.step import StepResult, TrainingStep, read_later
from tiny_models import EASY, SAMPLED, catalogue, loaded, settings, ten_users, training_step

CASES = {
    "catalogue": EASY["SASRec"],
    "sampled": {**SAMPLED, "sampling_strategy": "local"},
    "in-batch": {**SAMPLED, "sampling_strategy": "in-batch"},
    "masked": EASY["masked"],
    "replaced": EASY["replaced"],
}


def step_and_example(choices: dict, optimizer: str = "adamw") -> tuple[TrainingStep, TrainingExample]:
    """A step whose optimizer has weight decay, warm-up and clipping."""
    chosen = settings(**choices)
    step = training_step(chosen, catalogue())
    table = step.task.model.items.table
    dense = [parameter for parameter in step.task.parameters() if parameter is not table]
    step.optimizer = Optimizer(dense, table, OPTIMIZERS[optimizer].make(1e-2, 0.1), 5, 1.0)
    return step, step.task.prepare(loaded(ten_users()), 0).example


def run(step: TrainingStep, example: TrainingExample, number: int) -> StepResult:
    return step.update(step.task.draw(example, 0, number), number)


def uncounted(example: TrainingExample) -> TrainingExample:
    return dataclasses.replace(example, targets=example.targets * 0, weights=example.weights * 0)


def without_reads(example: TrainingExample) -> TrainingExample:
    none = torch.zeros(0, dtype=torch.int64)
    return dataclasses.replace(example, read=none, targets=none, weights=none.float(), users=none, ratings=None)


def state_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """Copies of all weights and of the optimizer's state."""
    tensors = step.task.state_dict()
    return {name: value.detach().clone() for name, value in {**tensors, **step.optimizer.state_tensors()}.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adamw", "rowwise_adagrad"])
@pytest.mark.parametrize("empty", [uncounted, without_reads])
def test_nothing_moves_after_a_normal_step(case: str, optimizer: str, empty) -> None:
    step, example = step_and_example(CASES[case], optimizer)
    before = state_of(step)
    assert run(step, example, 0).learning_rate > 0
    moved = state_of(step)
    assert any(not torch.equal(moved[name], value) for name, value in before.items())
    result = run(step, empty(example), 1)
    assert (float(result.targets), result.learning_rate) == (0, 0)
    assert torch.isfinite(result.loss)
    assert_same(state_of(step), moved)


def test_the_schedule_goes_by_the_number_of_the_step() -> None:
    """Warm-up over five steps: the third step's rate is the same, whether or not the second counted."""
    step, example = step_and_example(CASES["sampled"])
    rates = [run(step, each, n).learning_rate for n, each in enumerate([example, uncounted(example), example])]
    assert rates == pytest.approx([2e-3, 0.0, 6e-3])


class WithAnother(Collectives):
    """As if another process had three targets."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(3)


def test_targets_of_another_process_count() -> None:
    step, example = step_and_example(CASES["catalogue"])
    run(step, example, 0)
    before, step.collectives = state_of(step), WithAnother()
    assert run(step, uncounted(example), 1).learning_rate > 0
    assert not torch.equal(state_of(step)["model.items.table"], before["model.items.table"])


def test_warning_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    step, example = step_and_example(CASES["catalogue"])
    for number, each in enumerate([example, uncounted(example), example, uncounted(example)]):
        run(step, each, number)
    assert len(lines) == 1 and "step 2 has no target with weight" in lines[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_scalar_is_read_later(device: str) -> None:
    value = torch.tensor(2.5, device=device)
    read = read_later(value)
    assert (read(), read()) == (2.5, 2.5)
