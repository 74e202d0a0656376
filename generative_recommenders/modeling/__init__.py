"""Embeddings, preprocessors, postprocessors, the retriever, and building blocks for bodies assembled by hand.

Encoders are in `encoders`, interactions in `similarity`.
"""

from .aggregators import ConcatAggregator, PositionAwareAggregator, SumAggregator
from .attention_masks import DefaultAttentionMask
from .differential_attention import (
    DiffTransformerBlock,
    DiffTransformerLayer,
    MultiHeadDifferentialAttention,
)
from .embeddings import CategoricalEmbeddingModule, ItemEmbedding, ItemRows, LocalEmbeddingModule
from .feature_embeddings import (
    CategoricalEmbedding,
    EmbeddingSpec,
    IdentityEmbedding,
    NumericalEmbedding,
    SequenceEmbedding,
)
from .feed_forward import PointWiseFeedForward, SwiGLU, SwiGLUEncoder
from .incremental import HistoryCache
from .input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    InputPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
)
from .layout import Layout, Visibility, jagged_layout, padded_layout
from .output_postprocessors import L2NormEmbeddingPostprocessor, LayerNormEmbeddingPostprocessor
from .recommender import SequenceEncoder, SequenceRecommender
from .sasrec_layer import SasRecTransformerLayer
from .transformer import MultiHeadAttention, PositionalEncoding, TransformerEncoder

__all__ = [
    "CategoricalEmbedding",
    "CategoricalEmbeddingModule",
    "CombinedItemAndRatingInputFeaturesPreprocessor",
    "ConcatAggregator",
    "DefaultAttentionMask",
    "DiffTransformerBlock",
    "DiffTransformerLayer",
    "EmbeddingSpec",
    "HistoryCache",
    "IdentityEmbedding",
    "InputPreprocessor",
    "ItemEmbedding",
    "ItemRows",
    "L2NormEmbeddingPostprocessor",
    "LayerNormEmbeddingPostprocessor",
    "Layout",
    "LearnablePositionalEmbeddingInputFeaturesPreprocessor",
    "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor",
    "LocalEmbeddingModule",
    "MultiHeadAttention",
    "MultiHeadDifferentialAttention",
    "NumericalEmbedding",
    "PointWiseFeedForward",
    "PositionAwareAggregator",
    "PositionalEncoding",
    "SasRecTransformerLayer",
    "SequenceEmbedding",
    "SequenceEncoder",
    "SequenceRecommender",
    "SumAggregator",
    "SwiGLU",
    "SwiGLUEncoder",
    "TransformerEncoder",
    "Visibility",
    "jagged_layout",
    "padded_layout",
]
