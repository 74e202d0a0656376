"""Whole training steps on input that is wrong: ids that are no items, nothing to predict, no ratings, NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.objectives.causal import CausalObjective
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.negative_samplers import SHARINGS
from generative_recommenders.training.debug import NonFiniteError
from generative_recommenders.training.step import StepResult, TrainingStep
from generative_recommenders.training.trainer import Trainer
from losses_by_name import CATALOGUE_LOSSES, SAMPLED_LOSSES
from tiny_models import NUM_ITEMS, catalogue, loaded, settings, ten_users, training_step

MOL = {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK", "num_negatives": 2}
LOSSES = [*CATALOGUE_LOSSES, *SAMPLED_LOSSES, "ScalableCrossEntropyLoss"]


def chosen(loss: str) -> RunSettings:
    sizes = {"sce.n_buckets": 4, "sce.bucket_size_x": 8, "sce.bucket_size_y": 8}
    return settings(loss_module=loss, num_negatives=4, sampling_strategy="local", **sizes)


def step_and_example(loss: str) -> tuple[TrainingStep, TrainingExample]:
    return training_step(chosen(loss), catalogue()), CausalObjective().example(ten_users())


def run(step: TrainingStep, example: TrainingExample, number: int = 0) -> StepResult:
    return step.update(step.task.draw(example, 0, number), number)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [-1, NUM_ITEMS + 1])
def test_positives_that_are_no_items(loss: str, wrong: int) -> None:
    step, example = step_and_example(loss)
    targets = example.targets.clone()
    targets[3] = wrong
    with pytest.raises(UserError, match="positives"):
        run(step, dataclasses.replace(example, targets=targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counts(loss: str) -> None:
    step, example = step_and_example(loss)
    before = {name: value.clone() for name, value in step.task.model.state_dict().items()}
    result = run(step, dataclasses.replace(example, weights=torch.zeros_like(example.weights)))
    assert (float(result.loss), float(result.targets)) == (0.0, 0.0)
    for name, value in step.task.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "choices",
    [
        *({"sampling_strategy": "in-batch", "num_negatives": 2, "negatives_sharing": sharing} for sharing in SHARINGS),
        {"loss_module": "CE", "objective": "replaced"},
        {"loss_module": "CE", "objective": "replaced", "fakes_from": "catalogue"},
        {"sampling_strategy": "local", "num_negatives": 2, "num_positives": 3},
        *({**MOL, "sampling_strategy": "local", "negatives_sharing": sharing} for sharing in SHARINGS),
    ],
)
def test_a_batch_without_targets(choices: dict[str, Any]) -> None:
    """Every user has one event, or the positional sampling left one: there is nothing to learn, and no error."""
    wanted = settings(**choices)
    step = training_step(wanted, catalogue())
    columns = {
        name: values[:, :2] * (torch.arange(2) < 1) if values.dim() == 2 else values
        for name, values in ten_users().items()
    }
    columns["lengths"] = torch.ones_like(columns["lengths"])
    assert step.task.prepare(loaded(columns), 0).example.targets.numel() == 0
    result = step(loaded(columns), 0)
    assert float(result.targets) == 0.0
    assert result.loss.isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_user_has_two_events(loss: str) -> None:
    step, _ = step_and_example(loss)
    columns = ten_users()
    for values in columns.values():
        if values.dim() == 2:
            values[:, 1:] = 0
    columns["lengths"] = torch.ones_like(columns["lengths"])
    assert not step.task.prepare(loaded(columns), 0).example.weights.any()
    assert float(step(loaded(columns), 0).loss) == 0.0
    assert all(bool(value.isfinite().all()) for value in step.task.model.state_dict().values())


def test_no_ratings_for_a_loss_that_reads_them() -> None:
    step, example = step_and_example("BCELossWithRatings")
    assert float(run(step, example).loss) > 0
    with pytest.raises(UserError, match="needs ratings"):
        run(step, dataclasses.replace(example, ratings=None), 1)


class Distance(Similarity):
    """A score that is no product: the negative squared distance."""

    def score(self, queries, items, user_ids=None):
        return -(queries[:, None] - items).square().sum(-1), {}


@pytest.mark.parametrize(("loss", "objective"), [("CE", "causal"), ("SampledSoftmaxLoss", "replaced")])
def test_a_similarity_without_products(loss: str, objective: str) -> None:
    """A plug-in's, of which only its scores show that they are none."""
    step = training_step(
        settings(loss_module=loss, objective=objective, num_negatives=4, sampling_strategy="local"),
        catalogue(),
    )
    step.task.model.similarity = Distance()
    with pytest.raises(UserError, match="scores of Distance are no products"):
        step.task.loss(loaded(ten_users()), 0)


def test_an_auxiliary_loss_that_a_similarity_does_not_make() -> None:
    task = training_step(chosen("SampledSoftmaxLoss"), catalogue()).task
    task.criterion.auxiliary_weights = {"mi_loss": 0.1}
    with pytest.raises(UserError, match="DotProductSimilarity made no auxiliary loss mi_loss in training"):
        task.loss(loaded(ten_users()), 0)
    assert task.eval().loss(loaded(ten_users()), 0).auxiliary == {}


@pytest.mark.parametrize(
    ("loss", "module"),
    [("CE", "preprocessor.dropout"), ("SampledSoftmaxLoss", "encoder.blocks.1"), ("gBCE", "postprocessor")],
)
def test_nan_names_the_first_module(
    monkeypatch: pytest.MonkeyPatch, ragged_dataset: SequenceDataset, loss: str, module: str
) -> None:
    module = f"model.sequence.{module}"
    trainer = Trainer(chosen(loss), ragged_dataset, make_split(ragged_dataset), Collectives())
    broken = trainer.task.get_submodule(module)
    healthy = broken.forward

    def forward(*inputs, **options):
        output = healthy(*inputs, **options)
        return torch.full_like(output, torch.nan) if trainer.progress.step >= 1 else output

    monkeypatch.setattr(broken, "forward", forward)
    with pytest.raises(NonFiniteError, match=rf"nan at step 2: .* not finite is that of {module};") as raised:
        trainer.train()
    assert raised.value.exit_code == 3
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
