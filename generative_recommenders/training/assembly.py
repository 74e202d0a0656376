"""From settings to objects: one table for each choice that a name makes. An unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..data.sequence_dataset import SequenceDataset
from ..evaluation.baselines import training_events
from ..features import UserError
from ..modeling.embeddings import CategoricalEmbeddingModule, ItemEmbedding, LocalEmbeddingModule
from ..modeling.encoders.hstu import HSTU
from ..modeling.encoders.sasrec import SASRec
from ..modeling.input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    InputPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
)
from ..modeling.output_postprocessors import L2NormEmbeddingPostprocessor, LayerNormEmbeddingPostprocessor
from ..modeling.recommender import SequenceEncoder, SequenceRecommender
from ..modeling.similarity.dot_product import DotProductSimilarity
from ..modeling.similarity.mixture_of_logits import MoLSimilarity
from ..objectives.catalogue_losses import CATALOGUE_LOSSES
from ..objectives.criterion import CatalogueCriterion, Criterion, SampledCriterion
from ..objectives.losses import SAMPLED_LOSSES, GBCELoss, SampledSoftmaxLoss
from ..objectives.masking import MaskedItemMasking, MaskEmbedding, MaskingScheme
from ..objectives.negative_samplers import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    MixedNegativesSampler,
    NegativesSampler,
    PopularityNegativesSampler,
    Sharing,
)
from ..objectives.scoring import LearnedScorer, ProductScorer, Scorer
from ..objectives.training_examples import CausalObjective, MaskedObjective
from .inference import InferenceInputs
from .settings import RunSettings

Built = TypeVar("Built")


def look_up(table: Mapping[str, Built], name: str, what: str) -> Built:
    """``table[name]``, or UserError with the known names."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]


@dataclass(frozen=True)
class Catalogue:
    """What models and samplers need of a data set: sizes, training counts, and what columns it has.

    counts: ``[V]`` training events of item id i + 1. categories: ``[V]`` int64 of the asked category feature, or None.
    """

    num_items: int
    has_ratings: bool
    has_timestamps: bool
    counts: torch.Tensor
    categories: torch.Tensor | None = None

    @classmethod
    def of(cls, dataset: SequenceDataset, train_stops: np.ndarray, category_feature: str | None = None) -> Catalogue:
        events = training_events(dataset.offsets, train_stops)
        counts = np.bincount(dataset.items[events], minlength=dataset.num_items + 1)[1:]
        categories = None if category_feature is None else _categories(dataset, category_feature)
        return cls(
            dataset.num_items,
            dataset.ratings is not None,
            dataset.timestamps is not None,
            torch.from_numpy(counts),
            categories,
        )


def _categories(dataset: SequenceDataset, feature: str) -> torch.Tensor:
    """Category 1.. of every item by the feature, 0 where it has none."""
    table = dataset.item_features()
    if table is None or feature not in table.column_names:
        known = "none" if table is None else ", ".join(table.column_names)
        raise UserError(f"train_fn.category_feature {feature!r} is no item feature of {dataset.manifest.name}; known: {known}")
    codes = table.column(feature).combine_chunks().dictionary_encode().indices
    return torch.from_numpy(codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)) + 1


def build_model(settings: RunSettings, catalogue: Catalogue) -> SequenceRecommender:
    """The retriever of the settings; UserError where choices do not go together or the data lack what one needs."""
    try:
        items = look_up(EMBEDDINGS, settings.train.embedding_module_type, "embedding_module_type")(settings, catalogue)
        preprocessor = look_up(PREPROCESSORS, _short(settings.train.input_preprocessor), "input_preprocessor")(settings, catalogue)
        encoder = look_up(ENCODERS, settings.train.main_module, "main_module")(settings, preprocessor.embedding_dim)
        postprocessor = look_up(POSTPROCESSORS, settings.train.user_embedding_norm, "user_embedding_norm")(settings)
        similarity = look_up(SIMILARITIES, settings.train.interaction_module_type, "interaction_module_type")(
            settings, encoder.output_dim, items.embedding_dim
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if settings.train.interaction_module_type != "MoL" and encoder.output_dim != items.embedding_dim:
        raise UserError(
            f"states have width {encoder.output_dim} and items {items.embedding_dim}: "
            f"{settings.train.interaction_module_type or 'DotProduct'} needs them equal; choose MoL or another preprocessor"
        )
    mask = MaskEmbedding(items.embedding_dim) if settings.train.objective in MASKING_SCHEMES else None
    return SequenceRecommender(items, SequenceEncoder(preprocessor, encoder, postprocessor), similarity, mask)


def _short(preprocessor: str) -> str:
    return preprocessor.removesuffix("InputFeaturesPreprocessor")


def _local(settings: RunSettings, catalogue: Catalogue) -> ItemEmbedding:
    return LocalEmbeddingModule(catalogue.num_items, settings.train.item_embedding_dim)


def _categorical(settings: RunSettings, catalogue: Catalogue) -> ItemEmbedding:
    if catalogue.categories is None:
        raise UserError('embedding_module_type "categorical" needs train_fn.category_feature, an item feature of the data')
    return CategoricalEmbeddingModule(catalogue.categories, settings.train.item_embedding_dim)


EMBEDDINGS: dict[str, Callable[[RunSettings, Catalogue], ItemEmbedding]] = {
    "local": _local,
    "categorical": _categorical,
}


def _positional(settings: RunSettings, catalogue: Catalogue) -> InputPreprocessor:
    t = settings.train
    return LearnablePositionalEmbeddingInputFeaturesPreprocessor(t.max_tokens, t.item_embedding_dim, t.dropout_rate)


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
    if not catalogue.has_ratings:
        name = settings.train.input_preprocessor
        raise UserError(f"input_preprocessor {name!r} needs ratings, and {settings.train.dataset_name} has none")


PREPROCESSORS: dict[str, Callable[[RunSettings, Catalogue], InputPreprocessor]] = {
    "LearnablePositionalEmbedding": _positional,
    "LearnablePositionalEmbeddingRated": _rated,
    "CombinedItemAndRating": _combined,
}


def _sasrec(settings: RunSettings, width: int) -> SASRec:
    return SASRec(width, **vars(settings.sasrec), activation_checkpoint=settings.encoder.activation_checkpoint)


def _hstu(settings: RunSettings, width: int) -> HSTU:
    doubled = 2 if _short(settings.train.input_preprocessor) == "CombinedItemAndRating" else 1
    return HSTU(
        width,
        doubled * settings.train.max_tokens,
        **vars(settings.hstu),
        next_time=settings.train.next_time,
        activation_checkpoint=settings.encoder.activation_checkpoint,
    )


ENCODERS: dict[str, Callable[[RunSettings, int], torch.nn.Module]] = {"SASRec": _sasrec, "HSTU": _hstu}

POSTPROCESSORS: dict[str, Callable[[RunSettings], torch.nn.Module]] = {
    "l2_norm": lambda settings: L2NormEmbeddingPostprocessor(settings.train.l2_norm_eps),
    "layer_norm": lambda settings: LayerNormEmbeddingPostprocessor(settings.train.l2_norm_eps),
}

SIMILARITIES: dict[str, Callable[[RunSettings, int, int], torch.nn.Module]] = {
    "": lambda settings, query_dim, item_dim: DotProductSimilarity(),
    "DotProduct": lambda settings, query_dim, item_dim: DotProductSimilarity(),
    "MoL": lambda settings, query_dim, item_dim: MoLSimilarity.from_settings(settings.mol, query_dim, item_dim),
}

MASKING_SCHEMES: dict[str, Callable[[RunSettings], MaskingScheme]] = {
    "masked": lambda settings: MaskedItemMasking(settings.train.mask_probability),
}


def build_objective(settings: RunSettings) -> CausalObjective | MaskedObjective:
    """What is predicted: every next item, the last one, or hidden positions."""
    if settings.train.objective in MASKING_SCHEMES:
        return MaskedObjective(MASKING_SCHEMES[settings.train.objective](settings))
    known = {"causal": False, "causal_last": True, **{name: False for name in MASKING_SCHEMES}}
    return CausalObjective(last_only=look_up(known, settings.train.objective, "objective"))


def build_criterion(settings: RunSettings, catalogue: Catalogue) -> Criterion:
    """The loss with its scorer, by ``train_fn.loss_module``."""
    t = settings.train
    weights = {**settings.weighted_loss.weights, **t.loss_weights}
    if t.loss_module in CATALOGUE_LOSSES and t.loss_module not in SAMPLED_LOSSES:
        return _catalogue_criterion(settings, weights)
    loss_class = look_up({**SAMPLED_LOSSES, **CATALOGUE_LOSSES}, t.loss_module, "loss_module")
    if loss_class is GBCELoss:
        loss = GBCELoss(catalogue.num_items, t.calibration)
    elif loss_class is SampledSoftmaxLoss:
        loss = SampledSoftmaxLoss(t.label_smoothing)
    else:
        loss = loss_class()
    if loss.needs_ratings and not catalogue.has_ratings:
        raise UserError(f"{t.loss_module} needs ratings, and {t.dataset_name} has none")
    return SampledCriterion(loss, build_scorer(settings), weights, t.loss_activation_checkpoint)


def _catalogue_criterion(settings: RunSettings, weights: Mapping[str, float]) -> Criterion:
    t = settings.train
    if t.interaction_module_type == "MoL":
        raise UserError(f"{t.loss_module} scores the catalogue by dot product; with MoL choose a sampled loss")
    if weights:
        raise UserError(f"loss_weights name {', '.join(weights)}, which {t.loss_module} does not produce")
    return CatalogueCriterion(CATALOGUE_LOSSES[t.loss_module](), t.temperature, t.item_l2_norm, t.l2_norm_eps)


def build_scorer(settings: RunSettings) -> Scorer:
    t = settings.train
    if t.interaction_module_type == "MoL":
        return LearnedScorer(t.temperature, t.item_l2_norm, t.l2_norm_eps)
    positives = t.item_l2_norm and t.loss_module != "BCELoss"  # published: its positives are not normalised
    return ProductScorer(t.temperature, positives, t.item_l2_norm, t.l2_norm_eps)


def build_sampler(settings: RunSettings, catalogue: Catalogue, name: str | None = None) -> NegativesSampler:
    """The negative sampler by ``train_fn.sampling_strategy``."""
    t = settings.train
    try:
        sharing = Sharing(t.negatives_sharing, t.negatives_block_size)
        return look_up(SAMPLERS, name or t.sampling_strategy, "sampling_strategy")(settings, catalogue, sharing)
    except ValueError as error:
        raise UserError(str(error)) from error


def _mixed(settings: RunSettings, catalogue: Catalogue, sharing: Sharing) -> NegativesSampler:
    shares = settings.train.mixed_shares
    if "mixed" in shares:
        raise UserError("train_fn.mixed_shares cannot hold 'mixed' itself")
    samplers = [build_sampler(settings, catalogue, name) for name in shares]
    return MixedNegativesSampler(samplers, list(shares.values()), settings.train.num_negatives)


SAMPLERS: dict[str, Callable[[RunSettings, Catalogue, Sharing], NegativesSampler]] = {
    "local": lambda s, c, sharing: LocalNegativesSampler(c.num_items, s.train.num_negatives, sharing),
    "in-batch": lambda s, c, sharing: InBatchNegativesSampler(
        s.train.num_negatives, sharing, s.train.log_q_correction
    ),
    "popularity": lambda s, c, sharing: PopularityNegativesSampler(
        c.counts, s.train.popularity_power, s.train.num_negatives, sharing, s.train.log_q_correction
    ),
    "mixed": _mixed,
}


def build_inference(settings: RunSettings) -> InferenceInputs:
    """How histories become inputs when the next item is scored."""
    name = settings.train.objective
    return InferenceInputs(MASKING_SCHEMES[name](settings) if name in MASKING_SCHEMES else None)
