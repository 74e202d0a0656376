"""RePlay's embedding modules: tables of cardinality + 1 rows, that of the padding value among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.data.schema import FeatureHint, TensorFeatureInfo, TensorSchema
from generative_recommenders.compat.replay.nn.protocols import EmbedderProto
from generative_recommenders.config.sections import ListReduction
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.feature_embeddings import EmbeddingRows, NamedEmbeddings

__all__ = [
    "CategoricalEmbedding",
    "EmbedderProto",
    "IdentityEmbedding",
    "NumericalEmbedding",
    "SequenceEmbedding",
]


class CategoricalEmbedding(EmbeddingRows):
    """Embedding of a categorical feature; the entries of a list are summed, averaged or their maximum is taken."""

    def __init__(
        self, feature_info: TensorFeatureInfo, categorical_list_feature_aggregation_method: ListReduction = "sum"
    ) -> None:
        name, padding = feature_info.name, feature_info.padding_value
        categories = feature_info.cardinality or 0
        if categories < 1:
            raise UserError(f"feature {name!r}: a categorical feature needs a cardinality of at least 1")
        if not 0 <= padding <= categories:
            raise UserError(f"feature {name!r}: padding id {padding} lies outside 0..{categories}")
        reduction = categorical_list_feature_aggregation_method if feature_info.is_list else None
        super().__init__(categories + 1, feature_info.embedding_dim, padding, reduction)
        self.padding_value = padding

    @property
    def weight(self) -> Tensor:
        """``[cardinality, D]``: the rows in the order of their ids, without that of padding."""
        table, padding = self.emb.weight, self.padding_value
        if padding == len(table) - 1:  # RePlay's usual one: a view, not a copy of the table
            return table[:-1]
        return torch.cat([table[:padding], table[padding + 1 :]])


class NumericalEmbedding(nn.Module):
    """A linear layer with bias over a value or a list of values; a list as wide as the embedding passes unchanged."""

    def __init__(self, feature_info: TensorFeatureInfo) -> None:
        super().__init__()
        self.is_list = feature_info.is_list
        embedding_dim = feature_info.embedding_dim
        width = (feature_info.tensor_dim or 1) if self.is_list else 1
        passes = width == embedding_dim
        self.linear = IdentityEmbedding(feature_info) if passes else nn.Linear(width, embedding_dim)

    @property
    def embedding_dim(self) -> int:
        return len(self.weight)

    @property
    def weight(self) -> Tensor:
        """``[D, width]``, the identity matrix where nothing is learned."""
        return self.linear.weight

    def forward(self, values: Tensor) -> Tensor:
        """float ``[...]`` (one value; ``[B, N, 1]`` too) or ``[..., width]`` (a list) to ``[..., D]``."""
        return self.linear(values if self.is_list or values.dim() > 2 else values.unsqueeze(-1))


class IdentityEmbedding(nn.Module):
    """Values ``[..., D]`` that already are an embedding come out unchanged; ``weight`` is the identity ``[D, D]``."""

    weight: Tensor

    def __init__(self, feature_info: TensorFeatureInfo) -> None:
        super().__init__()
        self.embedding_dim = feature_info.tensor_dim or feature_info.embedding_dim
        self.register_buffer("weight", torch.eye(self.embedding_dim), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return values


class SequenceEmbedding(NamedEmbeddings):
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
        reduction = categorical_list_feature_aggregation_method
        super().__init__(
            {f.name: CategoricalEmbedding(f, reduction) if f.is_cat else NumericalEmbedding(f) for f in kept}
        )
        self._item = next((f.name for f in kept if f.feature_hint is FeatureHint.ITEM_ID), None)

    @property
    def embeddings_dim(self) -> dict[str, int]:
        """The width of every feature's embedding."""
        return {name: self.embedder(name).embedding_dim for name in self._keys}  # type: ignore[misc]

    def get_item_weights(self, indices: Tensor | None = None) -> Tensor:
        """The embeddings of items: ``[..., D]`` for ids ``[...]``, or of all ids below padding's, row j for item j.

        UserError for the latter where items lie beyond the padding id.
        """
        if self._item is None:
            raise UserError("the schema names no item id feature, so there are no item embeddings to read")
        items: CategoricalEmbedding = self.embedder(self._item)  # type: ignore[assignment]
        if indices is not None:
            return items(indices)
        table, padding = items.emb.weight, items.padding_value
        cardinality = len(table) - 1
        if padding < cardinality - 1:  # column j would be another item than j beyond the row left out
            raise UserError(
                f"feature {self._item!r}: padding id {padding} lies among the items 0..{cardinality - 1}, so column j "
                f"of all scores would not be item j: give padding_value={cardinality} and ids from 0"
            )
        return table[:padding]
