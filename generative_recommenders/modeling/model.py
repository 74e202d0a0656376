"""The retriever: embed, preprocess, encode, postprocess, score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import (
    HistoryCache,
    IncrementalEncoder,
    append_tokens,
    check_append,
    new_layout,
)
from generative_recommenders.modeling.events import token_events
from generative_recommenders.modeling.input_preprocessors import EncoderInput, InputPreprocessor
from generative_recommenders.modeling.items import ItemEmbedding, ItemRows
from generative_recommenders.ops.layout import Layout, Visibility, jagged_layout, padded_layout
from generative_recommenders.types import SequentialFeatures


class SequenceEncoder(torch.nn.Module):
    """Preprocessor, encoder and postprocessor: the dense part of a retriever, from item embeddings to query states.

    context_merger: called as ``(states [T, D], events) -> [T, D]`` before the postprocessor, to bring in what is known
    of the query beside its history.
    """

    def __init__(
        self,
        preprocessor: InputPreprocessor,
        encoder: torch.nn.Module,
        postprocessor: torch.nn.Module,
        context_merger: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.encoder = encoder
        self.postprocessor = postprocessor
        self.context_merger = context_merger

    def forward(
        self, items: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """items: ``[T, D]`` embeddings of the history's tokens. Returns ``[T, D']``: the state after each input token."""
        inputs: EncoderInput = self.preprocessor(items, layout, events)
        states = self.encoder(inputs.x, inputs.layout, inputs.events)
        if inputs.read is not None:
            states = states.index_select(0, inputs.read)
        if self.context_merger is not None:
            states = self.context_merger(states, events)
        return layout.mask(self.postprocessor(states))

    def append(
        self,
        cache: HistoryCache | None,
        items: torch.Tensor,
        layout: Layout,
        events: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, HistoryCache]:
        """The states ``[B, D']`` after `forward` of histories that go on with ``items [T, D]``, and their cache.

        layout: jagged, of the new items alone (see `incremental.new_layout`).
        """
        encoder = appendable_encoder(self, layout)
        inputs: EncoderInput = self.preprocessor(items, layout, events)
        cache = append_tokens(encoder, cache, inputs.x, inputs.layout, inputs.events)
        states = cache.last_output
        if self.context_merger is not None:
            states = self.context_merger(states, cache.last_events)
        filled = (cache.lengths > 0).to(states.device)
        return self.postprocessor(states) * filled[:, None], cache


class SequenceRecommender(torch.nn.Module):
    """A sequence encoder over item embeddings, with a similarity to score items by.

    Item ids are 1..V, 0 is padding; rectangles are right-padded, oldest event first.
    """

    def __init__(
        self,
        items: ItemEmbedding,
        sequence: SequenceEncoder,
        similarity: torch.nn.Module,
        mask_embedding: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.items = items
        self.sequence = sequence
        self.similarity = similarity
        self.mask_embedding = mask_embedding

    def get_item_embeddings(self, item_ids: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` as scored, for ids of any shape."""
        return self.items.get_item_embeddings(item_ids)

    def embed_history(self, item_ids: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` as looked up by histories, for ids of any shape."""
        return self.items.embed_history(item_ids)

    @property
    def constant_width(self) -> int | None:
        """HSTU's N, the width that it divides by; None for other encoders."""
        return getattr(self.sequence.encoder, "max_length", None)

    def forward(
        self,
        past_lengths: torch.Tensor,
        past_ids: torch.Tensor,
        past_embeddings: torch.Tensor | None = None,
        past_events: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encodes whole rectangles.

        past_lengths ``[B]``, past_ids ``[B, N]``, past_embeddings ``[B, N, D]`` (looked up when None), past_events: see
        `features.SequentialFeatures`. Returns ``[B, N, D]``: the state after each position, 0 at padding.
        """
        layout = padded_layout(past_lengths, past_ids.shape[1])
        embeddings = self.embed_history(past_ids) if past_embeddings is None else past_embeddings
        events = token_events(past_events or {}, past_lengths, layout, self.constant_width)
        return layout.to_rectangle(self.sequence(layout.flatten(embeddings), layout, events))

    def encode(
        self,
        past_lengths: torch.Tensor,
        past_ids: torch.Tensor,
        past_embeddings: torch.Tensor | None = None,
        past_events: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``[B, D]``: the state after each row's last real position, computed on the real tokens alone."""
        features = SequentialFeatures(past_lengths, past_ids, dict(past_events or {}))
        layout = jagged_layout(past_lengths, past_ids.shape[1], past_ids.device)
        rows = self.items.history_rows(ItemRows(self.items.table)) if past_embeddings is None else None
        items = None if past_embeddings is None else layout.flatten(past_embeddings)
        return layout.at_end(self.encode_tokens(features, layout, rows, items))

    @torch.no_grad()
    def encode_incremental(
        self,
        cache: HistoryCache | None,
        new_lengths: torch.Tensor,
        new_ids: torch.Tensor,
        new_events: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, HistoryCache]:
        """`encode` of the cached histories with further items behind them, computed on the new items alone.

        cache: what the last call gave, None to begin. new_lengths ``[B]`` (0: none in this row), new_ids ``[B, M]``;
        new_events: `features.SequentialFeatures`'s of the new items, the same names in every call;
        ``next_timestamps [B]`` where the time of the event to predict is known, 0 otherwise.
        Returns the states ``[B, D]`` and the cache that a later call goes on from. No gradients.

        HSTU with ``next_time = "given"`` encodes each row's last old item again, as the time of the event after it is
        known now. UserError: histories that outgrow the window, encoders and objectives that cannot append.
        """
        if self.mask_embedding is not None:
            raise UserError(
                "encode_incremental: the model was built for a masked objective, whose items see later ones; only causal "
                "histories can be appended to"
            )
        per_item = self.sequence.preprocessor.tokens_per_item
        encoded = torch.zeros_like(new_lengths, device="cpu") if cache is None else cache.lengths // per_item
        check_append(encoded, new_lengths, window=len(self.sequence.preprocessor.position) // per_item)
        layout = new_layout(encoded, new_lengths, new_ids.device)
        events = dict(new_events or {})
        if "timestamps" in events:
            events["timestamps"] = F.pad(events["timestamps"], (0, 1))  # a slot behind every row: unknown
        if cache is not None and "timestamps" in events:
            first, following = events["timestamps"][:, 0], events.get("next_timestamps")
            cache = cache.with_next_times(
                first if following is None else first.where(layout.lengths > 0, following)
            )
        items = self.embed_history(layout.flatten(new_ids))
        return self.sequence.append(cache, items, layout, token_events(events, new_lengths, layout))

    def encode_tokens(
        self,
        features: SequentialFeatures,
        layout: Layout,
        rows: ItemRows | None = None,
        items: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, D]``: the state after every token. rows: what the history looks up; or its embeddings ``items [T, D]``."""
        if items is None:
            rows = rows or self.items.history_rows(ItemRows(self.items.table))
            items = rows.lookup(layout.flatten(features.past_ids))
        events = token_events(features.past_events, features.past_lengths, layout, self.constant_width)
        return self.sequence(items, layout, events)


def appendable_encoder(sequence: SequenceEncoder, layout: Layout) -> IncrementalEncoder:
    """The sequence's encoder; UserError where histories cannot be encoded piece by piece."""
    encoder: object = sequence.encoder
    if not isinstance(encoder, IncrementalEncoder):
        name = type(encoder).__name__
        raise UserError(f"encode_incremental: {name} keeps nothing of a history; SASRec and HSTU do")
    if layout.visibility is not None:
        raise UserError(
            "encode_incremental: the layout says who sees whom, and only causal histories can be appended to"
        )
    if sequence.training:
        raise UserError(
            "encode_incremental: the model is in training mode, where dropout acts; call eval() first"
        )
    return encoder


def visibility_tokens(key: torch.Tensor, query: torch.Tensor, layout: Layout) -> Visibility:
    """Rectangular key and query integers ``[B, N]`` as those of the layout's tokens."""
    return Visibility(layout.flatten(key), layout.flatten(query))
