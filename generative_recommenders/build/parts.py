"""From settings to objects: the model (`assembly_model`) and what it learns by (`assembly_objectives`)."""

from __future__ import annotations

from functools import partial

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.model import build_model, build_sequence, build_top_k
from generative_recommenders.build.objectives import (
    MASKING_SCHEMES,
    build_inference,
    build_objective,
    build_sampler,
)
from generative_recommenders.build.objectives import build_criterion as _build_criterion
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.objectives.criterion import Criterion

__all__ = [
    "MASKING_SCHEMES",
    "Catalogue",
    "build_criterion",
    "build_inference",
    "build_model",
    "build_objective",
    "build_sampler",
    "build_top_k",
]


def build_criterion(
    settings: RunSettings, catalogue: Catalogue, model: SequenceRecommender | None = None
) -> Criterion:
    """The loss with its scorer. model: only a discriminator tied to its encoder needs it."""
    return _build_criterion(settings, catalogue, partial(_discriminator, settings, catalogue, model))


def _discriminator(
    settings: RunSettings, catalogue: Catalogue, model: SequenceRecommender | None
) -> SequenceEncoder:
    if not settings.train.tie_discriminator:
        return build_sequence(settings, catalogue)
    if model is None:
        raise UserError("train_fn.tie_discriminator: a tied discriminator is built from its model")
    return model.sequence
