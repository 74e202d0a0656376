"""RePlay's SasRec, and what it shares with TwoTower: the query tower and the forward pass."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from generative_recommenders.compat.replay.data.schema import TensorSchema, item_id_feature
from generative_recommenders.compat.replay.nn import protocols
from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator, SumAggregator
from generative_recommenders.compat.replay.nn.embedding import SequenceEmbedding
from generative_recommenders.compat.replay.nn.head import EmbeddingTyingHead
from generative_recommenders.compat.replay.nn.loss import CE
from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask
from generative_recommenders.compat.replay.nn.output import InferenceOutput, TrainOutput
from generative_recommenders.compat.replay.nn.sequential.layers import SasRecTransformerLayer
from generative_recommenders.config.sections import ListReduction
from generative_recommenders.errors import UserError


class QueryTower(nn.Module):
    """Embeds features, aggregates them, encodes them under an attention mask, and normalises the result.

    feature_names: the features it reads; None for all that the embedder knows.
    """

    def __init__(
        self,
        feature_names: Sequence[str] | None,
        embedder: protocols.EmbedderProto,
        embedding_aggregator: protocols.AggregatorProto,
        attn_mask_builder: protocols.AttentionMaskProto,
        encoder: protocols.EncoderProto,
        output_normalization: protocols.NormalizerProto,
    ) -> None:
        super().__init__()
        self.feature_names = feature_names
        self.embedder = embedder
        self.embedding_aggregator = embedding_aggregator
        self.attn_mask_builder = attn_mask_builder
        self.encoder = encoder
        self.output_normalization = output_normalization

    def forward(self, feature_tensors: protocols.Tensors, padding_mask: Tensor) -> Tensor:
        """Features ``[B, N, ...]`` by name and padding_mask ``[B, N]`` (True = real) to ``[B, N, D]``."""
        embeddings = self.embedding_aggregator(self.embedder(feature_tensors, self.feature_names))
        hidden = call_with_accepted(
            self.encoder,
            feature_tensors=feature_tensors,
            input_embeddings=embeddings,
            padding_mask=padding_mask,
            attention_mask=self.attn_mask_builder(feature_tensors, padding_mask),
        )
        return self.output_normalization(hidden)


class NextItemModel(nn.Module, ABC):
    """A query tower, item embeddings and a loss."""

    scores_rectangles = True
    """`get_logits` takes hidden states ``[B, N, D]`` with ids ``[B, K]``."""

    def __init__(self, body: nn.Module, loss: protocols.LossProto) -> None:
        super().__init__()
        self.body = body
        self.head = EmbeddingTyingHead()
        self.loss = loss
        self.loss.logits_callback = self.get_logits

    def forward(
        self,
        feature_tensors: protocols.Tensors,
        padding_mask: Tensor,
        candidates_to_score: Tensor | None = None,
        positive_labels: Tensor | None = None,
        negative_labels: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
    ) -> TrainOutput | InferenceOutput:
        """In training mode the loss, in evaluation mode the logits of the item after each row's last position.

        feature_tensors: name to ``[B, N, ...]``, left-padded. padding_mask: bool ``[B, N]``, True = real.
        candidates_to_score: item ids ``[C]`` or ``[B, C]`` to score instead of the catalogue (evaluation only).
        positive_labels: ``[B, N, P]``; negative_labels: as the loss takes them; target_padding_mask: bool
        ``[B, N, P]``, False = ignored (training only). UserError for what the loss needs and is not given.
        """
        hidden_states = self.hidden_states(feature_tensors, padding_mask)
        if not self.training:
            logits = self.get_logits(hidden_states[-1][:, -1], candidates_to_score)
            return InferenceOutput(logits, hidden_states)
        if positive_labels is None:
            raise UserError("positive_labels are missing: in training mode the model computes its loss from them")
        loss = call_with_accepted(
            self.loss,
            model_embeddings=hidden_states[-1],
            feature_tensors=feature_tensors,
            positive_labels=positive_labels,
            negative_labels=negative_labels,
            padding_mask=padding_mask,
            target_padding_mask=target_padding_mask,
        )
        return TrainOutput(loss, hidden_states)

    def hidden_states(self, feature_tensors: protocols.Tensors, padding_mask: Tensor) -> tuple[Tensor, ...]:
        """The body's output, followed by what is computed from it; the last one is scored."""
        return (self.body(feature_tensors, padding_mask),)

    def get_logits(self, model_embeddings: Tensor, candidates_to_score: Tensor | None = None) -> Tensor:
        """Scores of hidden states ``[..., D]`` with the candidates' embeddings, or with all items'."""
        return self.head(model_embeddings, self.item_embeddings(candidates_to_score))

    @abstractmethod
    def item_embeddings(self, candidates_to_score: Tensor | None = None) -> Tensor:
        """``[V, D]``, or ``[..., D]`` for ids ``[...]``."""


def call_with_accepted(function: Callable[..., Tensor], **arguments: object) -> Tensor:
    """Call with those keyword arguments that the function (a module: its forward) has parameters for."""
    # RePlay's users write encoders and losses that take a part of the documented arguments.
    parameters = inspect.signature(getattr(function, "forward", function)).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return function(**arguments)


def embedded_schema(schema: TensorSchema, excluded: Sequence[str] | None, embedding_dim: int) -> TensorSchema:
    """The features but the excluded ones, the query id and the timestamp, each of ``embedding_dim`` columns."""
    left_out = [schema.query_id_feature_name, schema.timestamp_feature_name, *(excluded or ())]
    kept = [feature for feature in schema.all_features if feature.name not in left_out]
    return TensorSchema([replace(feature, embedding_dim=embedding_dim) for feature in kept])


class SasRecBody(QueryTower):
    """The query tower over all features that the embedder knows; its item table also scores."""

    def __init__(
        self,
        embedder: protocols.EmbedderProto,
        embedding_aggregator: protocols.AggregatorProto,
        attn_mask_builder: protocols.AttentionMaskProto,
        encoder: protocols.EncoderProto,
        output_normalization: protocols.NormalizerProto,
    ) -> None:
        super().__init__(None, embedder, embedding_aggregator, attn_mask_builder, encoder, output_normalization)


class SasRec(NextItemModel):
    """A `SasRecBody` (arXiv 1808.09781), scored against its own item embeddings."""

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
        """SASRec layers with relu, layer norm and full cross-entropy over the sum of all features of the schema but the
        excluded ones, the query id and the timestamp."""
        schema = embedded_schema(schema, excluded_features, embedding_dim)
        item = item_id_feature(schema, cls.__name__)
        body = SasRecBody(
            embedder=SequenceEmbedding(schema, None, categorical_list_feature_aggregation_method),
            embedding_aggregator=PositionAwareAggregator(SumAggregator(embedding_dim), max_sequence_length, dropout),
            attn_mask_builder=DefaultAttentionMask(item.name, num_heads),
            encoder=SasRecTransformerLayer(embedding_dim, num_heads, num_blocks, dropout, "relu"),
            output_normalization=nn.LayerNorm(embedding_dim),
        )
        return cls(body, CE(ignore_index=item.padding_value))

    def item_embeddings(self, candidates_to_score: Tensor | None = None) -> Tensor:
        return self.body.embedder.get_item_weights(candidates_to_score)
