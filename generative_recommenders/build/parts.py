"""From settings to objects: the model (`assembly_model`) and what it learns by (`assembly_objectives`)."""

from __future__ import annotations

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.model import build_model, build_sequence
from generative_recommenders.build.objectives import build_criterion as _build_criterion
from generative_recommenders.build.objectives import build_objective, build_sampler
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.objectives.criterion import Criterion
from generative_recommenders.objectives.task import TrainingTask

__all__ = [
    "Catalogue",
    "build_criterion",
    "build_model",
    "build_objective",
    "build_sampler",
    "build_task",
]


def build_task(
    settings: RunSettings, catalogue: Catalogue, collectives: Collectives | None = None
) -> TrainingTask:
    """Model, objective, criterion and sampler, on the processes' device."""
    collectives = collectives or Collectives()
    model = build_model(settings, catalogue).to(collectives.device)
    criterion = build_criterion(settings, catalogue, model).to(collectives.device)
    sampler = build_sampler(settings, catalogue).to(collectives.device) if criterion.needs_negatives else None
    objective = build_objective(settings)
    return TrainingTask(
        model, objective, criterion, sampler, settings.schedule.random_seed, collectives,
        numbers_rows=settings.schedule.deterministic,
    )  # fmt: skip


def build_criterion(
    settings: RunSettings, catalogue: Catalogue, model: SequenceRecommender | None = None
) -> Criterion:
    """The loss with its scorer. model: only a discriminator tied to its encoder needs it."""

    def encoder(tied: bool) -> SequenceEncoder:
        if not tied:
            return build_sequence(settings, catalogue)
        if model is None:
            raise UserError("train_fn.tie_discriminator: a tied discriminator is built from its model")
        return model.sequence

    return _build_criterion(settings, catalogue, encoder)
