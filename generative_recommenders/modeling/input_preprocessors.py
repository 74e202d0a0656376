"""Input preprocessors: item embeddings, positions and event columns to the inputs of an encoder.

A preprocessor takes the tokens of a batch (``[T, D]`` item embeddings in a layout, and events, one value per
token) and returns the encoder's tokens, an ``EncoderInput``. It may change the layout (interleaved ratings double the
tokens), so it also says at which of its tokens the state after input token t is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Le

from generative_recommenders.config.fields import Share, Width
from generative_recommenders.config.registry import register_input_preprocessor
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import required
from generative_recommenders.modeling.initialization import truncated_normal_
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.ops.layout import (
    AttentionMask,
    Layout,
    device_layout,
    jagged_layout,
    padded_layout,
)

TokenEvents = Mapping[str, torch.Tensor]
"""Per token ``[T]``: ``ratings``, float32; ``timestamps``, ``next_timestamps`` (time of the event after it), int64."""
NumRatings = Annotated[int, Ge(1), Le(1 << 16)]
"""Rating values that have an embedding: 0 and those after it."""


@dataclass(frozen=True)
class EncoderInput:
    """x: ``[T', E]``; layout and events of those tokens; read: ``[T]`` token of x whose state predicts what follows
    input token t, or None where that is token t itself."""

    x: torch.Tensor
    layout: Layout
    events: dict[str, torch.Tensor]
    read: torch.Tensor | None = None


class InputPreprocessor(torch.nn.Module):
    """Base: ``forward(items [T, D], layout, events) -> EncoderInput``.

    max_length: the most tokens of the encoder in a history. embedding_dim: their width E. tokens_per_item: how many
    there are for each event.
    """

    SUPPLIED = frozenset({"max_length", "embedding_dim", "item_embedding_dim"})
    """Passed by the program; ``max_length`` counts events, and the other two are both the width of the items."""
    tokens_per_item = 1
    needs_ratings = False
    num_ratings: int | None = None
    """Ratings below this have an embedding, from 0 on; None where every number will do."""
    appendable = True
    """Whether a token's input stays the same when later events follow."""

    def __init__(self, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.max_length, self.embedding_dim = max_length, embedding_dim


class LearnedPositions(InputPreprocessor):
    """Base: item embedding scaled by sqrt(E) plus a learned position, dropout.

    Positions count from 0 at the oldest event; ``max_length`` rows are learned.
    """

    def __init__(self, max_length: int, embedding_dim: int, dropout_rate: Share = 0.2) -> None:
        super().__init__(max_length, embedding_dim)
        self.position = torch.nn.Parameter(torch.empty(max_length, embedding_dim))
        truncated_normal_(self.position.data, std=embedding_dim**-0.5)
        self.dropout = Dropout(dropout_rate)

    def places(self, layout: Layout) -> torch.Tensor:
        """``[T]`` int64: the learned position of each token."""
        return layout.positions

    def add_positions(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        if layout.longest > self.max_length:
            raise UserError(
                f"a history of {layout.longest} tokens, and the model has {self.max_length} positions: "
                "keep only the latest ones"
            )
        x = torch.add(lookup_rows(self.position, self.places(layout)), x, alpha=self.embedding_dim**0.5)
        return layout.mask(self.dropout(x))


@register_input_preprocessor("LearnablePositionalEmbedding", "LearnablePositionalEmbeddingInputFeaturesPreprocessor")
class LearnablePositionalEmbeddingInputFeaturesPreprocessor(LearnedPositions):
    """``sqrt(D) item + position`` (SASRec, arXiv 1808.09781, section III-A, scaled as in HSTU's public runs)."""

    def forward(self, items: torch.Tensor, layout: Layout, events: TokenEvents) -> EncoderInput:
        return EncoderInput(self.add_positions(items, layout), layout, dict(events))


@register_input_preprocessor("LearnablePositionalEmbeddingFromEnd")
class LearnablePositionalEmbeddingFromEnd(LearnablePositionalEmbeddingInputFeaturesPreprocessor):
    """``sqrt(D) item + position``, the newest event at the last row, as in programs that pad on the left (RePlay,
    RecTools).

    A further event moves all others by one, so histories cannot be encoded incrementally.
    """

    appendable = False

    def places(self, layout: Layout) -> torch.Tensor:
        to_end = layout.lengths.index_select(0, layout.row_of) - layout.positions
        # Below 0 past the end of a padded row, whose tokens are masked afterwards.
        return (self.max_length - to_end).clamp(max=self.max_length - 1)


@register_input_preprocessor(
    "LearnablePositionalEmbeddingRated", "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor"
)
class LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(LearnedPositions):
    """``sqrt(E) [item ; rating] + position`` with E = D_item + D_rating.

    num_ratings: rating values 0..num_ratings-1 have an embedding; half stars have that of the whole star below, as
    published.
    rating_embedding_dim: width of a rating's embedding, D_rating.
    """

    needs_ratings = True

    def __init__(
        self,
        max_length: int,
        item_embedding_dim: int,
        dropout_rate: Share = 0.2,
        rating_embedding_dim: Width = 8,
        num_ratings: NumRatings = 6,
    ) -> None:
        super().__init__(max_length, item_embedding_dim + rating_embedding_dim, dropout_rate)
        self.num_ratings = num_ratings
        self.rating = rating_table(num_ratings, rating_embedding_dim)

    def forward(self, items: torch.Tensor, layout: Layout, events: TokenEvents) -> EncoderInput:
        ratings = lookup_rows(self.rating, required(events, "ratings", self).long())
        x = torch.cat([items, ratings], dim=-1)
        return EncoderInput(self.add_positions(x, layout), layout, dict(events))


@register_input_preprocessor("CombinedItemAndRating", "CombinedItemAndRatingInputFeaturesPreprocessor")
class CombinedItemAndRatingInputFeaturesPreprocessor(LearnedPositions):
    """item_0, rating_0, item_1, rating_1, ...: twice the tokens, positions over 2N.

    The state after rating t predicts item t + 1.

    num_ratings: rating values 0..num_ratings-1 have an embedding.
    """

    tokens_per_item = 2
    needs_ratings = True

    def __init__(
        self, max_length: int, item_embedding_dim: int, dropout_rate: Share = 0.2, num_ratings: NumRatings = 6
    ) -> None:
        super().__init__(2 * max_length, item_embedding_dim, dropout_rate)
        self.num_ratings = num_ratings
        self.rating = rating_table(num_ratings, item_embedding_dim)

    def forward(self, items: torch.Tensor, layout: Layout, events: TokenEvents) -> EncoderInput:
        ratings = lookup_rows(self.rating, required(events, "ratings", self).long())
        x = torch.stack([items, ratings], dim=1).flatten(0, 1)
        doubled = double_layout(layout)
        read = 2 * torch.arange(layout.num_tokens, device=layout.device) + 1
        both = {name: _twice(values) for name, values in events.items()}
        if "next_timestamps" in events:
            # After an item comes its own rating, at the same time; after a rating, the next item.
            times = [events["timestamps"], events["next_timestamps"]]
            both["next_timestamps"] = torch.stack(times, dim=1).flatten()
        return EncoderInput(self.add_positions(x, doubled), doubled, both, read)


def rating_table(num_ratings: int, embedding_dim: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(truncated_normal_(torch.empty(num_ratings, embedding_dim)))


def double_layout(layout: Layout) -> Layout:
    """Every token becomes two, side by side, which attend to what it attended to."""
    if layout.valid is not None:
        doubled = padded_layout(layout.lengths * 2, layout.max_length * 2)
    else:
        if layout.host_lengths is None:
            doubled = device_layout(layout.lengths * 2, layout.max_length * 2, layout.num_tokens * 2)
        else:
            lengths = torch.from_numpy(layout.host_lengths * 2)
            doubled = jagged_layout(lengths, layout.max_length * 2, layout.device)
        positions = torch.stack([2 * layout.positions, 2 * layout.positions + 1], dim=1).flatten()
        doubled = replace(doubled, positions=positions)  # an extended history does not begin at 0
    if layout.attention_mask is None:
        return doubled
    repeated = (_twice(x) for x in (layout.attention_mask.key, layout.attention_mask.query))
    return doubled.with_attention_mask(AttentionMask(*repeated))


def _twice(values: torch.Tensor) -> torch.Tensor:
    """Each of ``values [T]`` two times, side by side; ONNX has no `repeat_interleave`."""
    return torch.stack([values, values], dim=1).flatten()
