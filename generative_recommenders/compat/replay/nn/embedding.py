"""The embedding modules of `modeling.feature_embeddings` under RePlay's documented signatures.

Tables have cardinality + 1 rows, the row of the padding value among them, and no bucket for unknown ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from generative_recommenders.compat.replay.data.schema import (
    FeatureHint,
    FeatureType,
    TensorFeatureInfo,
    TensorSchema,
)
from generative_recommenders.errors import UserError
from generative_recommenders.modeling import feature_embeddings as core

ListReduction = Literal["sum", "mean", "max"]


class CategoricalEmbedding(core.CategoricalEmbedding):
    """Embedding of a categorical feature, single or list."""

    def __init__(
        self,
        feature_info: TensorFeatureInfo,
        categorical_list_feature_aggregation_method: ListReduction = "sum",
    ) -> None:
        super().__init__(embedding_spec(feature_info, categorical_list_feature_aggregation_method))


class NumericalEmbedding(core.NumericalEmbedding):
    """Embedding of a numerical feature, single or list."""

    def __init__(self, feature_info: TensorFeatureInfo) -> None:
        super().__init__(embedding_spec(feature_info))


class SequenceEmbedding(core.SequenceEmbedding):
    """An embedding for every feature of the schema but the excluded ones."""

    def __init__(
        self,
        schema: TensorSchema,
        excluded_features: Sequence[str] | None = None,
        categorical_list_feature_aggregation_method: ListReduction = "sum",
    ) -> None:
        kept = [f for f in schema.all_features if f.name not in (excluded_features or ())]
        if not kept:
            raise UserError(f"SequenceEmbedding: every feature of the schema ({schema.names}) is excluded")
        super().__init__([embedding_spec(f, categorical_list_feature_aggregation_method) for f in kept])
        self._numbers = {f.name for f in kept if f.feature_type is FeatureType.NUMERICAL}

    def forward(
        self, feature_tensor: Mapping[str, torch.Tensor], feature_names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """As of the core; a number may have a last axis of its own, ``[B, L, 1]`` for ``[B, L]``."""
        given = {
            name: x.squeeze(-1) if name in self._numbers and x.dim() > 2 else x
            for name, x in feature_tensor.items()
        }
        return super().forward(given, feature_names)


def embedding_spec(feature: TensorFeatureInfo, list_reduction: ListReduction = "sum") -> core.EmbeddingSpec:
    """What the core needs to know of a RePlay feature."""
    return core.EmbeddingSpec(
        name=feature.name,
        kind=feature.feature_type.value,
        embedding_dim=feature.embedding_dim or 0,
        cardinality=feature.cardinality or 0,
        width=feature.tensor_dim or 1,
        padding_index=feature.padding_value if feature.is_cat else 0,
        unknown_bucket=False,
        list_reduction=list_reduction,
        is_item_id=feature.feature_hint is FeatureHint.ITEM_ID,
    )
