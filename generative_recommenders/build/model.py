"""Builders of the model and its objective from settings; named parts come from their registries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.factories import (
    get_input_preprocessor,
    get_output_postprocessor,
    get_sequential_encoder,
    get_similarity_function,
)
from generative_recommenders.build.registered import build_part, options_of
from generative_recommenders.config.registry import (
    ENCODERS,
    INPUT_PREPROCESSORS,
    ITEM_EMBEDDINGS,
    OBJECTIVES,
    OUTPUT_POSTPROCESSORS,
    SIMILARITIES,
)
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.config.sections import ListReduction
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.two_tower import EntityFeature, FeatureMerger
from generative_recommenders.modeling.events import EventFeatures
from generative_recommenders.modeling.initialization import xavier_normal_matrices_
from generative_recommenders.modeling.items import ItemEmbedding
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.sharded_items import ShardedItemEmbedding, TorchRecItemEmbedding
from generative_recommenders.objectives import causal, masked, replaced  # noqa: F401  (register)
from generative_recommenders.objectives.objective import Objective


def build_objective(settings: RunSettings) -> Objective:
    """The objective: next items of every position or of the last one, or hidden positions."""
    supplies = {"embedding_dim": settings.items.item_embedding_dim}
    objective: Objective = build_part(settings, OBJECTIVES, settings.loss.objective, supplies)
    return objective


def auxiliary_weights(settings: RunSettings) -> dict[str, float]:
    """Weights of auxiliary losses by name; those of ``train_fn`` go before ``get_weighted_loss``'s, and MoL's own
    decay of user embeddings is added.
    """
    weights = {**settings.weighted_loss.weights, **settings.loss.loss_weights}
    decay = settings.value("create_mol_interaction_module.uid_embedding_l2_weight_decay")
    if decay and settings.model.interaction_module_type == "MoL":
        weights["uid_embedding_l2_norm"] = weights.get("uid_embedding_l2_norm", 0.0) + decay
    return weights


def build_model(
    settings: RunSettings, catalogue: Catalogue, collectives: Collectives | None = None
) -> SequenceRecommender:
    """The retriever of the settings; UserError where choices do not go together or the data lack what one
    needs. collectives: the processes that share a sharded item table; without them the table is whole.
    """
    own = settings.items.embedding_module_type
    if own not in (settings.item_embedding, "local"):  # the default contradicts nothing
        raise UserError(
            f"train_fn.embedding_module_type {own!r} has no effect in {settings.model.main_module}, which has an item "
            "tower: unset it"
        )
    width, item_table = settings.items.item_embedding_dim, settings.items.item_table
    sharded = item_table != "replicated"

    def read_item_features(names: Sequence[str], list_reduction: ListReduction) -> list[EntityFeature]:
        return catalogue.features("item", names, width, "item_tower.features", list_reduction) if names else []

    supplies = {
        "num_items": catalogue.num_items,
        "embedding_dim": width,
        "item_category": catalogue.categories,
        "read_features": lambda options: read_item_features,
    }
    similarity_name = settings.similarity_name
    bf16 = torch.bfloat16 if settings.model.main_module_bf16 else None
    switched_on = {name: True for name, on in dict(settings.similarity).items() if on}
    if bf16 is not None:
        switched_on["bf16_training"] = True
    try:  # parts of plug-ins, and tables by rows, may refuse what they are given by ValueError
        if sharded:
            _check_sharded(settings)
        if sharded and collectives is not None and collectives.world_size > 1:
            options = options_of(settings, ITEM_EMBEDDINGS, settings.item_embedding)
            kind = TorchRecItemEmbedding if item_table == "torchrec" else ShardedItemEmbedding
            items: ItemEmbedding = kind(catalogue.num_items, width, collectives, **options)
        else:
            items = build_part(settings, ITEM_EMBEDDINGS, settings.item_embedding, supplies)
        sequence = build_sequence(settings, catalogue)
        similarity = get_similarity_function(
            similarity_name, width, width, mutual_information="mi_loss" in auxiliary_weights(settings),
            score_dtype=bf16, **{**options_of(settings, SIMILARITIES, similarity_name), **switched_on},
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    if sharded and similarity.operands(torch.empty(0, width), torch.empty(0, width)) is None:
        raise UserError(
            f"train_fn.item_table {item_table!r} needs scores that are products, and those of {similarity_name} are "
            "none: set 'replicated'"
        )
    missing = sorted(set(auxiliary_weights(settings)) - similarity.auxiliary_loss_names)
    if missing:
        offered = ", ".join(sorted(similarity.auxiliary_loss_names)) or "none"
        raise UserError(
            f"loss_weights name {', '.join(missing)}, which this configuration does not produce ({offered})"
        )
    return SequenceRecommender(items, sequence, similarity, build_objective(settings), bf16)


def _check_sharded(settings: RunSettings) -> None:
    """UserError where the table of the settings cannot be sharded as they say."""
    asked = f"train_fn.item_table {settings.items.item_table!r}"
    if settings.item_embedding != "local":
        raise UserError(
            f"{asked} needs a row for each item, and item embedding {settings.item_embedding!r} has "
            "others: set 'replicated'"
        )
    if settings.fine_tuning.initialize_from is not None:
        raise UserError(
            f"{asked} cannot begin with another run's rows: unset train_fn.initialize_from, or set 'replicated'"
        )
    updates = settings.updates
    if settings.items.item_table == "torchrec" and (
        updates.optimizer != "rowwise_adagrad" or updates.weight_decay or updates.max_grad_norm is not None
    ):
        raise UserError(
            f"{asked} updates rows in its backward pass by row-wise Adagrad alone: set train_fn.optimizer = "
            "'rowwise_adagrad', train_fn.weight_decay = 0 and train_fn.max_grad_norm = None, "
            "or item_table to 'sharded'"
        )


def build_sequence(settings: RunSettings, catalogue: Catalogue) -> SequenceEncoder:
    """The dense part: preprocessor, encoder, context merger, postprocessor."""
    width, name = settings.items.item_embedding_dim, settings.model.input_preprocessor
    options = options_of(settings, INPUT_PREPROCESSORS, name)
    preprocessor = get_input_preprocessor(name, settings.data.max_tokens, width, **options)
    if preprocessor.needs_ratings:
        _check_ratings(settings, catalogue, preprocessor.num_ratings)

    def encoder_of(name: str) -> torch.nn.Module:
        return get_sequential_encoder(
            name, preprocessor.embedding_dim, settings.data.max_tokens * preprocessor.tokens_per_item,
            query_encoder=encoder_of, **options_of(settings, ENCODERS, name),
        )  # fmt: skip

    encoder, objective = encoder_of(settings.model.main_module), build_objective(settings)
    for attribute in ("causal", "output_dim"):
        if not hasattr(encoder, attribute):
            raise UserError(f"encoder {settings.encoder_name!r} lacks the attribute {attribute!r}: set it in the class")
    if objective.uses_mask and not (encoder.causal and getattr(encoder, "takes_attention_mask", True)):
        hint = "; choose hstu_encoder.normalization 'rel_bias'" if settings.encoder_name == "HSTU" else ""
        raise UserError(
            f"objective {settings.loss.objective!r} shows both sides of a hidden item by an attention mask, which "
            f"encoder {settings.encoder_name!r} does not follow{hint}"
        )
    if getattr(encoder, "redraws_inputs", False):
        xavier_normal_matrices_(preprocessor)
    name = settings.model.user_embedding_norm
    postprocessor = get_output_postprocessor(name, width, **options_of(settings, OUTPUT_POSTPROCESSORS, name))
    out = cast(int, encoder.output_dim)
    with torch.no_grad():
        scored = postprocessor.eval()(torch.zeros(1, out)).shape[-1]
    postprocessor.train()
    if scored != width:
        raise UserError(
            f"states of encoder {settings.encoder_name!r} are {scored} wide after train_fn.user_embedding_norm "
            f"{name!r}, and items {width}: choose 'l2_norm' or 'layer_norm', which keep the first {width} columns of "
            "wider ones"
        )
    merger = None
    if names := settings.queries.query_features:
        reduction = settings.value("item_tower.list_reduction")
        asked_by = "item_tower.query_features"
        merger = FeatureMerger(catalogue.features("user", names, out, asked_by, reduction), out)
    return SequenceEncoder(preprocessor, encoder, postprocessor, merger, _event_features(settings, catalogue))


def _event_features(settings: RunSettings, catalogue: Catalogue) -> EventFeatures | None:
    """``train_fn.event_features``: further columns by name, the rating and the time."""
    names = settings.data.event_features
    for number, name in enumerate(names):
        if name not in catalogue.event_features:
            known = ", ".join(catalogue.event_features) or "no event columns"
            raise UserError(
                f"train_fn.event_features: {settings.data.dataset_name} has no {name!r}; it has {known}; --columns of "
                "preprocess_public_data.py keeps more"
            )
        if name in names[:number]:
            raise UserError(f"train_fn.event_features names {name!r} twice")
    features = [catalogue.event_features[name] for name in names]
    return EventFeatures(features, settings.items.item_embedding_dim) if features else None


def _check_ratings(settings: RunSettings, catalogue: Catalogue, known: int | None) -> None:
    """UserError where the chosen preprocessor reads ratings and the data have none, or others than it has embeddings
    of. known: see `InputPreprocessor.num_ratings`."""
    if not catalogue.has_ratings:
        raise UserError(
            f"input_preprocessor {settings.model.input_preprocessor!r} needs ratings, "
            f"and {settings.data.dataset_name} has none"
        )
    lowest, highest = catalogue.rating_range or (0.0, 0.0)
    if known is not None and (lowest < 0 or highest >= known):
        raise UserError(
            f"input_preprocessor {settings.model.input_preprocessor!r} has embeddings of the ratings 0 to {known - 1} "
            f"(train_fn.num_ratings), and those of {settings.data.dataset_name} reach from {lowest:g} to {highest:g}"
        )
