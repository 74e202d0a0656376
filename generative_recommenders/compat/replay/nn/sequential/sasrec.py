"""RePlay's SasRec over the blocks of this package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from generative_recommenders.compat.replay.data.schema import TensorSchema
from generative_recommenders.compat.replay.nn import protocols
from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator, SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.loss import CE
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.sequential.next_item import (
    NextItemModel,
    QueryTower,
    embedded_schema,
)
from generative_recommenders.compat.replay.nn.sequential.sasrec_layer import SasRecTransformerLayer
from generative_recommenders.config.sections import ListReduction


class SasRecBody(QueryTower):
    """The query tower over all features that the embedder knows; its item table also scores."""

    embedder: protocols.EmbedderProto

    def __init__(
        self,
        embedder: protocols.EmbedderProto,
        embedding_aggregator: protocols.AggregatorProto,
        attn_mask_builder: protocols.AttentionMaskProto,
        encoder: protocols.EncoderProto,
        output_normalization: protocols.NormalizerProto,
    ) -> None:
        super().__init__(
            None, embedder, embedding_aggregator, attn_mask_builder, encoder, output_normalization
        )


class SasRec(NextItemModel):
    """A `SasRecBody` (arXiv 1808.09781) scored against the item embeddings that it looks up."""

    body: SasRecBody

    @classmethod
    def from_params(
        cls,
        schema: TensorSchema,
        embedding_dim: int = 192,
        num_heads: int = 4,
        num_blocks: int = 2,
        max_sequence_length: int = 50,
        dropout: float = 0.3,
        excluded_features: Sequence[str] | None = None,
        categorical_list_feature_aggregation_method: ListReduction = "sum",
    ) -> SasRec:
        """SASRec layers with relu, features summed, layer norm, full cross-entropy.

        It reads all features of the schema but the excluded ones, the query id and the timestamp, each
        embedded in ``embedding_dim`` columns.
        """
        schema = embedded_schema(schema, excluded_features, embedding_dim)
        item = schema.item_id_features.item()
        body = SasRecBody(
            embedder=SequenceEmbedding(schema, None, categorical_list_feature_aggregation_method),
            embedding_aggregator=PositionAwareAggregator(
                SumAggregator(embedding_dim), max_sequence_length, dropout
            ),
            attn_mask_builder=DefaultAttentionMask(item.name, num_heads),
            encoder=SasRecTransformerLayer(embedding_dim, num_heads, num_blocks, dropout, "relu"),
            output_normalization=nn.LayerNorm(embedding_dim),
        )
        return cls(body, CE(ignore_index=item.padding_value))

    def item_embeddings(self, candidates_to_score: torch.Tensor | None = None) -> torch.Tensor:
        return self.body.embedder.get_item_weights(candidates_to_score)
