"""Small parts of every kind, registered as a plug-in registers its own."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge

from generative_recommenders import (
    register_input_preprocessor,
    register_item_embedding,
    register_negative_sampler,
    register_output_postprocessor,
    register_similarity,
    register_top_k,
)
from generative_recommenders.modeling.input_preprocessors import EncoderInput, InputPreprocessor
from generative_recommenders.modeling.items import ItemEmbedding
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.objectives.negative_samplers import NegativesSampler, Sharing
from generative_recommenders.ops.counter_random import counter_integers
from generative_recommenders.retrieval.top_k import MIPSBruteForceTopK


@register_negative_sampler("latest", gin_name="newest_negatives")
class Newest(NegativesSampler):
    """Uniform over the items with the largest ids."""

    def __init__(self, num_items: int, num_negatives: int, sharing: Sharing, newest: Annotated[int, Ge(1)] = 5) -> None:
        super().__init__(num_negatives, sharing)
        self.newest = min(newest, num_items)
        self.before = num_items - self.newest

    def draw(self, key, units, draws, batch):
        return counter_integers(key, units, draws, self.newest) + self.before + 1, None


@register_output_postprocessor("scaled", gin_name="scaled")
class Scaled(torch.nn.Module):
    def __init__(self, embedding_dim: int, factor: float = 0.5) -> None:
        super().__init__()
        self.embedding_dim, self.factor = embedding_dim, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x[..., : self.embedding_dim]


@register_input_preprocessor("ItemsAlone", gin_name="items_alone")
class ItemsAlone(InputPreprocessor):
    def __init__(self, max_length: int, embedding_dim: int, gain: float = 2.0) -> None:
        super().__init__(max_length, embedding_dim)
        self.gain = gain

    def forward(self, items, layout, events) -> EncoderInput:
        return EncoderInput(layout.mask(self.gain * items), layout, dict(events))


@register_top_k("Repeated", gin_name="repeated")
class Repeated(MIPSBruteForceTopK):
    """Searches as many times as asked for."""

    def __init__(self, similarity: DotProductSimilarity, item_embeddings: torch.Tensor, times: int = 2) -> None:
        super().__init__(similarity, item_embeddings)
        self.times = times


@register_item_embedding("halved", gin_name="halved")
class Halved(ItemEmbedding):
    """Starts from smaller rows."""

    def __init__(self, num_items: int, embedding_dim: int, part: float = 0.5) -> None:
        super().__init__(num_items, embedding_dim)
        self.table.data *= part


@register_similarity("Cosine", gin_name="cosine")
class Cosine(DotProductSimilarity):
    def __init__(self, sharpness: float = 10.0) -> None:
        super().__init__(1 / sharpness)
