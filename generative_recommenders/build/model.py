"""From settings to the retriever: one table for each choice that a name makes. An unknown name lists the
known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.objectives import MASKING_SCHEMES, auxiliary_weights, build_objective
from generative_recommenders.config.choices import look_up, short_preprocessor, uses_item_tower
from generative_recommenders.config.schema import RunSettings, TrainSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders import diff_transformer, hstu, sasrec, transformer  # noqa: F401  (register)
from generative_recommenders.modeling.encoders.two_tower import ITEM_ID, FeatureMerger, ItemTowerEmbedding
from generative_recommenders.modeling.event_features import EventFeatures
from generative_recommenders.modeling.feature_embeddings import ListReduction
from generative_recommenders.modeling.input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    InputPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.items import (
    CategoricalEmbeddingModule,
    ItemEmbedding,
    LocalEmbeddingModule,
)
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
    LayerNormEmbeddingPostprocessor,
)
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from generative_recommenders.retrieval.mol_top_k import TopK, make_top_k

SimilarityModule: TypeAlias = DotProductSimilarity | MoLSimilarity


def build_model(settings: RunSettings, catalogue: Catalogue) -> SequenceRecommender:
    """The retriever of the settings; UserError where choices do not go together or the data lack what one
    needs.
    """
    t = settings.train
    try:
        kind = _embedding_kind(settings)
        items = look_up(EMBEDDINGS, kind, "embedding_module_type")(settings, catalogue)
        sequence = build_sequence(settings, catalogue)
        build_similarity = look_up(SIMILARITIES, t.interaction_module_type, "interaction_module_type")
        similarity = build_similarity(settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    make_top_k(t.top_k_method, similarity, torch.zeros(1, items.embedding_dim))  # refuses what does not fit
    _check_auxiliary(settings, similarity)
    return SequenceRecommender(items, sequence, similarity, build_objective(settings))


def _embedding_kind(settings: RunSettings) -> str:
    """The entry of `EMBEDDINGS`; TwoTower has its tower, which "local", the default, does not contradict."""
    kind = settings.train.embedding_module_type
    if not uses_item_tower(settings):
        return kind
    if kind not in ("local", "item_tower"):
        raise UserError(
            f"train_fn.embedding_module_type {kind!r} cannot act in TwoTower, which has an item tower: unset it"
        )
    return "item_tower"


def build_sequence(settings: RunSettings, catalogue: Catalogue) -> SequenceEncoder:
    """The dense part: preprocessor, encoder, context merger, postprocessor."""
    t = settings.train
    preprocessor = look_up(PREPROCESSORS, short_preprocessor(settings), "input_preprocessor")(
        settings, catalogue
    )
    encoder = _encoder(settings, preprocessor.embedding_dim)
    if t.objective in MASKING_SCHEMES and not encoder.causal:
        raise UserError(
            f"objective {t.objective!r} decides who sees whom, which hstu_encoder.normalization "
            f"{settings.hstu.normalization!r} cannot follow; choose 'rel_bias'"
        )
    if t.objective in MASKING_SCHEMES and not getattr(encoder, "follows_visibility", True):
        raise UserError(
            f"objective {t.objective!r} shows both sides of a hidden item, which encoder {t.main_module!r} cannot read"
        )
    postprocessor = look_up(POSTPROCESSORS, t.user_embedding_norm, "user_embedding_norm")(t)
    merger = _context_merger(settings, catalogue, encoder)
    return SequenceEncoder(preprocessor, encoder, postprocessor, merger, _event_features(settings, catalogue))


def _event_features(settings: RunSettings, catalogue: Catalogue) -> EventFeatures | None:
    """``train_fn.event_features``: further columns by name, the rating and the time."""
    t = settings.train
    names = t.event_features
    for number, name in enumerate(names):
        if name not in catalogue.event_features:
            known = ", ".join(catalogue.event_features) or "no event columns"
            raise UserError(
                f"train_fn.event_features: {t.dataset_name} has no {name!r}; it has {known}; --columns of "
                "preprocess_public_data.py keeps more"
            )
        if name in names[:number]:
            raise UserError(f"train_fn.event_features names {name!r} twice")
    features = [catalogue.event_features[name] for name in names]
    return EventFeatures(features, t.item_embedding_dim) if features else None


def build_top_k(settings: RunSettings, model: SequenceRecommender) -> TopK:
    """The top-k module of ``train_fn.top_k_method`` over the model's items as they are now."""
    items = model.catalogue().embeddings
    return make_top_k(settings.train.top_k_method, cast(SimilarityModule, model.similarity), items)


def _check_auxiliary(settings: RunSettings, similarity: SimilarityModule) -> None:
    produced = similarity.auxiliary_loss_names
    missing = sorted(set(auxiliary_weights(settings)) - produced)
    if missing:
        offered = ", ".join(sorted(produced)) or "none"
        raise UserError(
            f"loss_weights name {', '.join(missing)}, which this configuration does not produce ({offered})"
        )


def _item_norm(t: TrainSettings) -> dict[str, Any]:
    return {"item_l2_norm": t.item_l2_norm, "l2_norm_eps": t.l2_norm_eps}


def _local(settings: RunSettings, catalogue: Catalogue) -> ItemEmbedding:
    return LocalEmbeddingModule(
        catalogue.num_items, settings.train.item_embedding_dim, **_item_norm(settings.train)
    )


def _categorical(settings: RunSettings, catalogue: Catalogue) -> ItemEmbedding:
    if catalogue.categories is None:
        raise UserError(
            'embedding_module_type "categorical" needs train_fn.category_feature, one category for each item'
        )
    return CategoricalEmbeddingModule(
        catalogue.categories, settings.train.item_embedding_dim, **_item_norm(settings.train)
    )


def _item_tower(settings: RunSettings, catalogue: Catalogue) -> ItemEmbedding:
    tower, dim = settings.item_tower, settings.train.item_embedding_dim
    names = [name for name in tower.features if name != ITEM_ID]
    features = []
    if names:
        if catalogue.items is None:
            raise UserError(f"item_tower.features: there is no data set to read {', '.join(names)} from")
        features = catalogue.items.read(
            names, dim, "item_tower.features", cast(ListReduction, tower.list_reduction)
        )
    return ItemTowerEmbedding(
        catalogue.num_items, dim, features, ITEM_ID in tower.features, tower.num_blocks,
        **_item_norm(settings.train),
    )  # fmt: skip


EMBEDDINGS: dict[str, Callable[[RunSettings, Catalogue], ItemEmbedding]] = {
    "local": _local,
    "categorical": _categorical,
    "item_tower": _item_tower,
}


def _context_merger(
    settings: RunSettings, catalogue: Catalogue, encoder: torch.nn.Module
) -> FeatureMerger | None:
    names = settings.item_tower.query_features
    if not names:
        return None
    if catalogue.users is None:
        raise UserError(f"item_tower.query_features: there is no data set to read {', '.join(names)} from")
    width = cast(int, encoder.output_dim)
    reduction = cast(ListReduction, settings.item_tower.list_reduction)
    return FeatureMerger(catalogue.users.read(names, width, "item_tower.query_features", reduction), width)


def _positional(settings: RunSettings, catalogue: Catalogue) -> InputPreprocessor:
    t = settings.train
    return LearnablePositionalEmbeddingInputFeaturesPreprocessor(
        t.max_tokens, t.item_embedding_dim, t.dropout_rate
    )


def _rated(settings: RunSettings, catalogue: Catalogue) -> InputPreprocessor:
    _need_ratings(settings, catalogue)
    t = settings.train
    return LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(
        t.max_tokens, t.item_embedding_dim, t.dropout_rate, t.rating_embedding_dim, t.num_ratings
    )


def _combined(settings: RunSettings, catalogue: Catalogue) -> InputPreprocessor:
    _need_ratings(settings, catalogue)
    t = settings.train
    return CombinedItemAndRatingInputFeaturesPreprocessor(
        t.max_tokens, t.item_embedding_dim, t.dropout_rate, t.num_ratings
    )


def _need_ratings(settings: RunSettings, catalogue: Catalogue) -> None:
    t = settings.train
    if not catalogue.has_ratings:
        raise UserError(
            f"input_preprocessor {t.input_preprocessor!r} needs ratings, and {t.dataset_name} has none"
        )
    lowest, highest = catalogue.rating_range or (0.0, 0.0)
    if lowest < 0 or highest >= t.num_ratings:
        raise UserError(
            f"input_preprocessor {t.input_preprocessor!r} has embeddings of the ratings 0 to {t.num_ratings - 1} "
            f"(train_fn.num_ratings), and those of {t.dataset_name} reach from {lowest:g} to {highest:g}"
        )


PREPROCESSORS: dict[str, Callable[[RunSettings, Catalogue], InputPreprocessor]] = {
    "LearnablePositionalEmbedding": _positional,
    "LearnablePositionalEmbeddingRated": _rated,
    "CombinedItemAndRating": _combined,
}


def _max_tokens(settings: RunSettings) -> int:
    """Positions that the encoder may see: interleaved ratings double them."""
    return settings.train.max_tokens * (2 if short_preprocessor(settings) == "CombinedItemAndRating" else 1)


def _encoder(settings: RunSettings, width: int) -> torch.nn.Module:
    """The encoder by ``train_fn.main_module``, or TwoTower's by ``item_tower.query_module``."""
    registry, name = settings.chosen_parts()[0]
    supplies = {"embedding_dim": width, "max_length": _max_tokens(settings)}
    return registry[name].build(settings.part_options(registry, name), supplies)


POSTPROCESSORS: dict[str, Callable[[TrainSettings], torch.nn.Module]] = {
    "l2_norm": lambda t: L2NormEmbeddingPostprocessor(t.l2_norm_eps, t.item_embedding_dim),
    "layer_norm": lambda t: LayerNormEmbeddingPostprocessor(t.l2_norm_eps, t.item_embedding_dim),
}


def _mol(settings: RunSettings) -> MoLSimilarity:
    bf16 = settings.mol.bf16_training or settings.similarity.bf16_training
    balanced = "mi_loss" in auxiliary_weights(settings)
    dim = settings.train.item_embedding_dim
    mol = replace(settings.mol, bf16_training=bf16)
    return MoLSimilarity.from_settings(mol, dim, dim, balanced, settings.train.temperature)


SIMILARITIES: dict[str, Callable[[RunSettings], SimilarityModule]] = {
    "": lambda settings: DotProductSimilarity(settings.train.temperature),
    "DotProduct": lambda settings: DotProductSimilarity(settings.train.temperature),
    "MoL": _mol,
}
