"""Protocols of the blocks that RePlay's bodies are assembled from.

Shapes: feature tensors ``[B, N, ...]`` by name, padding masks ``[B, N]`` bool (True = real), embeddings ``[B, N, D]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

__all__ = [
    "AggregatorProto",
    "AttentionMaskProto",
    "ContextMergerProto",
    "EmbedderProto",
    "EncoderProto",
    "FeaturesReaderProtocol",
    "ItemEncoderProto",
    "LossProto",
    "NormalizerProto",
    "QueryEncoderProto",
]

Tensors = Mapping[str, Tensor]


class AggregatorProto(Protocol):
    """Name to ``[..., D_name]`` in, ``[..., embedding_dim]`` out."""

    @property
    def embedding_dim(self) -> int: ...

    def __call__(self, feature_tensors: Tensors) -> Tensor: ...


class EmbedderProto(Protocol):
    """The named features, all unless given, as embeddings; the item table, or the rows of ids, to score with."""

    def __call__(self, feature_tensor: Tensors, feature_names: Sequence[str] | None = None) -> Tensors: ...

    def get_item_weights(self, indices: Tensor | None = None) -> Tensor: ...


class AttentionMaskProto(Protocol):
    """The additive mask ``[B * H, N, N]`` or ``[B, H, N, N]`` of a batch."""

    def __call__(self, feature_tensor: Tensors, padding_mask: Tensor) -> Tensor: ...


class EncoderProto(Protocol):
    """Hidden states ``[B, N, D]``, or item embeddings ``[..., D]``: called with those of feature_tensors,
    input_embeddings and, in the query tower, padding_mask and attention_mask that its signature has."""

    def __call__(self, **arguments: object) -> Tensor: ...


QueryEncoderProto = EncoderProto
ItemEncoderProto = EncoderProto


class NormalizerProto(Protocol):
    """The normalisation of hidden states, of their shape."""

    def __call__(self, hidden_states: Tensor) -> Tensor: ...


class LogitsCallback(Protocol):
    """Scores of hidden states with all items, or with those of the ids."""

    def __call__(self, model_embeddings: Tensor, candidates_to_score: Tensor | None = None) -> Tensor: ...


class LossProto(Protocol):
    """A loss: called with those of the keyword arguments below that it accepts.

    model_embeddings ``[B, N, D]``, feature_tensors, positive_labels ``[B, N, P]``, negative_labels, padding_mask, and
    target_padding_mask ``[B, N, P]``. The model sets ``logits_callback``.
    """

    logits_callback: LogitsCallback | None

    def __call__(self, **arguments: object) -> Tensor: ...


class ContextMergerProto(Protocol):
    """The query tower's hidden states joined with features of the query, of the same shape."""

    def __call__(self, model_hidden_state: Tensor, feature_tensors: Tensors) -> Tensor: ...


class FeaturesReaderProtocol(Protocol):
    """Feature tensors of all items by feature name; row i belongs to item id i."""

    def __getitem__(self, key: str) -> Tensor: ...
