"""Builders of the criterion and the negative sampler from settings."""

from __future__ import annotations

from typing import Any

import torch

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.entity_features import class_assignment
from generative_recommenders.build.factories import get_negatives_sampler
from generative_recommenders.build.model import auxiliary_weights, build_objective, build_sequence
from generative_recommenders.build.registered import build_part, options_of
from generative_recommenders.config.registry import LOSSES, NEGATIVE_SAMPLERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.objectives.criterion import CatalogueCriterion, Criterion, SampledCriterion
from generative_recommenders.objectives.losses import catalogue as catalogue_losses  # noqa: F401  (registers)
from generative_recommenders.objectives.losses.sampled import SampledLoss
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from generative_recommenders.objectives.negative_samplers import NegativesSampler, Sharing
from generative_recommenders.objectives.objective import Objective


def build_criterion(settings: RunSettings, catalogue: Catalogue, model: SequenceRecommender | None = None) -> Criterion:
    """The criterion by ``train_fn.loss_module``, with what the objective adds. model: only a discriminator tied to its
    encoder needs it."""
    objective, learned = build_objective(settings), settings.loss.objective
    name, data = settings.loss.loss_module, settings.data.dataset_name
    if name == "VQVAELoss":
        raise UserError(
            "VQVAELoss trains a tokenizer of items, not a retriever: see compat.VQVAELoss, "
            "and choose another loss_module"
        )
    # An unknown name is refused beside a loss that draws none, too.
    _ = NEGATIVE_SAMPLERS[settings.negatives.sampling_strategy]
    if settings.value("train_fn.target_weights") == "rating" and not catalogue.has_ratings:
        raise UserError(f'target_weights "rating" needs ratings, and {data} has none')
    loss = build_part(settings, LOSSES, name, {"num_items": catalogue.num_items})
    if isinstance(loss, SampledLoss):
        if settings.uses_item_tower and settings.negatives.negatives_sharing == "position":
            raise UserError(
                "an item tower computes the items that a step gathers, and negatives of each position gather most "
                'of the catalogue: set train_fn.negatives_sharing to "block" or "batch"'
            )
        if loss.needs_ratings and not catalogue.has_ratings:
            raise UserError(f"{name} needs ratings, and {data} has none")
        if loss.needs_ratings and objective.uses_mask:
            raise UserError(f"{name} needs ratings of the next items, which objective {learned!r} does not give")
        weights = auxiliary_weights(settings)
        criterion: Criterion = SampledCriterion(loss, weights, settings.loss.loss_activation_checkpoint)
    else:
        if settings.model.interaction_module_type == "MoL":
            raise UserError(f"{name} scores the catalogue by dot product; with MoL choose a sampled loss")
        if isinstance(loss, ScalableCrossEntropyLoss) and settings.value("train_fn.num_positives") > 1:
            raise UserError(f"{name} takes one positive a position: leave num_positives at 1")
        criterion = CatalogueCriterion(loss)
    _check_item_table(settings, objective, loss)
    if objective.needs_item_table and (settings.uses_item_tower or settings.model.interaction_module_type == "MoL"):
        raise UserError(f"objective {learned!r} samples and looks up fakes in the item table: no item tower, no MoL")

    def encoder(tied: bool) -> SequenceEncoder:
        if not tied:
            return build_sequence(settings, catalogue)
        if model is None:
            raise UserError("train_fn.tie_discriminator: a tied discriminator is built from its model")
        return model.sequence

    return objective.criterion(criterion, encoder)


def _check_item_table(settings: RunSettings, objective: Objective, loss: torch.nn.Module) -> None:
    """UserError where the objective or the loss reads rows that ``train_fn.item_table`` does not give."""
    table, name = settings.items.item_table, settings.loss.loss_module
    if table == "torchrec" and not isinstance(loss, SampledLoss):
        raise UserError(
            f"{name} reads every row of the item table, and train_fn.item_table 'torchrec' gives those that a step "
            "gathers: choose a sampled loss, or 'sharded'"
        )
    if table != "replicated" and (objective.needs_item_table or isinstance(loss, ScalableCrossEntropyLoss)):
        named = f"objective {settings.loss.objective!r}" if objective.needs_item_table else name
        raise UserError(f"{named} reads the whole item table in one process: set train_fn.item_table to 'replicated'")


def build_sampler(settings: RunSettings, catalogue: Catalogue, name: str | None = None) -> NegativesSampler:
    """The negative sampler by ``train_fn.sampling_strategy``, or one of a mixture by its name."""
    n = settings.negatives

    def mixed(options: dict[str, Any]) -> list[NegativesSampler]:
        if n.sampling_strategy in options["shares"]:
            raise UserError(f"train_fn.mixed_shares cannot hold {n.sampling_strategy!r} itself")
        return [build_sampler(settings, catalogue, each) for each in options["shares"]]

    chosen = name or n.sampling_strategy
    return get_negatives_sampler(
        chosen, catalogue.num_items, n.num_negatives, Sharing(n.negatives_sharing, n.negatives_block_size),
        catalogue.counts, mixed, lambda options: _classes(settings, catalogue),
        **options_of(settings, NEGATIVE_SAMPLERS, chosen),
    )  # fmt: skip


def _classes(settings: RunSettings, catalogue: Catalogue) -> torch.Tensor:
    """``[C, V]`` bool by ``train_fn.class_feature``."""
    n = settings.negatives
    if n.class_feature is None:
        raise UserError(
            f"sampling_strategy {n.sampling_strategy!r} needs train_fn.class_feature, an item feature of categories"
        )
    (feature,) = catalogue.features("item", [n.class_feature], 1, "train_fn.class_feature")
    if not feature.spec.is_categorical:
        raise UserError(f"train_fn.class_feature {n.class_feature!r} is {feature.spec.kind}: choose one of categories")
    return class_assignment(feature)
