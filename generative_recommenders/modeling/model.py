"""The retriever: embed, preprocess, encode, postprocess, score."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import (
    HistoryCache,
    agrees_with_forward,
    append_tokens,
    check_append,
    new_layout,
)
from generative_recommenders.modeling.encoders.base import can_append
from generative_recommenders.modeling.events import EventFeatures, history_features, token_events
from generative_recommenders.modeling.input_preprocessors import EncoderInput, InputPreprocessor
from generative_recommenders.modeling.inputs import LastEventReader, ModelInputs, Queries, QueryReader
from generative_recommenders.modeling.items import ItemEmbedding, ItemRows
from generative_recommenders.modeling.similarity.interface import Similarity, Snapshot, rounded
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.embedding import range_of
from generative_recommenders.ops.layout import Layout, last_tokens_pay, padded_layout
from generative_recommenders.types import Batch, SequentialFeatures


class SequenceEncoder(torch.nn.Module):
    """Preprocessor, encoder and postprocessor: the dense part of a retriever, from item embeddings to query states.

    context_merger: called as ``(states [T, D], events) -> [T, D]`` before the postprocessor, to add what is known of a
    query beside its history. event_features: adds event columns to the items, before the preprocessor.
    """

    def __init__(
        self,
        preprocessor: InputPreprocessor,
        encoder: torch.nn.Module,
        postprocessor: torch.nn.Module,
        context_merger: torch.nn.Module | None = None,
        event_features: EventFeatures | None = None,
    ) -> None:
        super().__init__()
        self.preprocessor, self.encoder, self.postprocessor = preprocessor, encoder, postprocessor
        self.context_merger, self.event_features = context_merger, event_features

    def forward(self, items: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """items: ``[T, D]`` item embeddings. Returns ``[T, D']``: the state after each input token."""
        inputs = self.encoder_input(items, layout, events)
        states = self.encoder(inputs.x, inputs.layout, inputs.events)
        if inputs.read is not None:
            states = states.index_select(0, inputs.read)
        return layout.mask(self.query_states(states, events))

    def encoder_input(self, items: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> EncoderInput:
        """The encoder's input, from item embeddings ``[T, D]``."""
        if self.event_features is not None:
            items = self.event_features(items, events)
        return self.preprocessor(items, layout, events)

    def query_states(self, states: torch.Tensor, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Query states from the encoder's."""
        if self.context_merger is not None:
            states = self.context_merger(states, events)
        return self.postprocessor(states)

    def last(self, items: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[B, D']``: the state after each row's last token, 0 for a row without tokens.

        In evaluation a causal encoder with ``encode_last(x, layout, events) -> [R, D]`` computes its last block for the
        last tokens of the R non-empty rows alone, where that is faster.
        """
        encoder: Any = self.encoder
        can_encode_last = agrees_with_forward(encoder, "encode_last") and encoder.causal and not self.training
        if not (can_encode_last and last_tokens_pay(layout, items)):
            return layout.at_end(self(items, layout, events))
        inputs = self.encoder_input(items, layout, events)
        filled = layout.lengths > 0
        tokens = layout.last_tokens[filled]
        # The preprocessor may read a token that is not the last of its row.
        if inputs.read is not None and not torch.equal(inputs.read[tokens], inputs.layout.last_tokens[filled]):
            return layout.at_end(self(items, layout, events))
        states = encoder.encode_last(inputs.x, inputs.layout, inputs.events)
        states = self.query_states(states, {name: values.index_select(0, tokens) for name, values in events.items()})
        return states.new_zeros(layout.num_rows, states.shape[1]).index_put((filled,), states)

    def append(
        self,
        cache: HistoryCache | None,
        items: torch.Tensor,
        layout: Layout,
        events: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, HistoryCache]:
        """The states ``[B, D']`` after `forward` of histories extended by ``items [T, D]``, and their cache.

        layout: jagged, of the new items alone (see `modeling.cache.new_layout`). UserError where the parts cannot
        encode histories incrementally.
        """
        preprocessor, encoder = type(self.preprocessor).__name__, type(self.encoder).__name__
        if not self.preprocessor.appendable:
            raise UserError(
                f"encode_incremental: {preprocessor} gives every event another position when one is appended"
            )
        if not can_append(self.encoder):
            raise UserError(f"encode_incremental: {encoder} keeps nothing of a history; SASRec, HSTU and others do")
        if layout.attention_mask is not None:
            raise UserError(
                "encode_incremental: the layout has an attention mask of its own, "
                "and only causal histories can be appended to"
            )
        if self.training:
            raise UserError("encode_incremental: the model is in training mode, where dropout acts; call eval() first")
        inputs = self.encoder_input(items, layout, events)
        cache = append_tokens(self.encoder, cache, inputs.x, inputs.layout, inputs.events)
        states = self.query_states(cache.last_output, cache.last_events)
        return states * (cache.lengths > 0).to(states.device)[:, None], cache


class MaskEmbedding(torch.nn.Module):
    """The learned vector that stands for a hidden item, ``weight [D]``, drawn from a normal of ``std``."""

    def __init__(self, embedding_dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(embedding_dim).normal_(std=std))

    def forward(self, embeddings: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
        """``embeddings [..., D]`` (rectangles or jagged), those at ``replaced [...]`` by the mask embedding."""
        return torch.where(replaced[..., None], self.weight.to(embeddings.dtype), embeddings)


class SequenceRecommender(torch.nn.Module):
    """A sequence encoder over item embeddings, with a similarity that scores items.

    Item ids are 1..V, 0 is padding; rectangles are right-padded, oldest event first.

    objective: makes the inputs of queries, see `QueryReader`; a query is the state after the last event unless given.
    autocast: dtype of the encoder's item embeddings and products, in training and evaluation alike, or None.
    """

    similarity: Similarity

    def __init__(
        self,
        items: ItemEmbedding,
        sequence: SequenceEncoder,
        similarity: Similarity,
        objective: QueryReader | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.items = items
        self.sequence = sequence
        self.similarity = similarity
        self.autocast = autocast
        self.objective = objective or LastEventReader()
        self.mask_embedding = MaskEmbedding(items.embedding_dim) if self.objective.uses_mask else None

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

    def encode_query(self, batch: Batch | SequentialFeatures, padded: bool = False) -> Queries:
        """Queries for the next item after each history.

        batch: the columns of an evaluation loader (``item_ids [B, N]``, ``lengths [B]``, event columns), or features. A
        row without events gets the state 0, or in a masked model that of its mask slot alone. padded: encode whole
        rectangles, as exports need.
        """
        features = batch if isinstance(batch, SequentialFeatures) else history_features(batch)
        inputs = self.objective.query(features, padded).to(self.items.table.device)
        states = self.states(inputs, last=inputs.read is None).float()
        return Queries(states, inputs.features.past_events.get("user_ids"))

    @torch.no_grad()
    def catalogue(self) -> Snapshot:
        """All items as they are scored now: through the tower, normalised, with MoL's components."""
        return self.similarity.snapshot(self.items.all_item_embeddings())

    def score(self, queries: Queries, items: Snapshot | torch.Tensor) -> torch.Tensor:
        """``[B, V]`` scores of the catalogue, or ``[B, R]`` of item ids ``[R]`` or ``[B, R]`` (-inf for padding, 0).
        UserError for ids on the CPU that are no items."""
        if not isinstance(items, torch.Tensor):
            return self.similarity.scores(queries.states, items, queries.user_ids)
        reach = range_of(items)
        if reach is not None and (reach[0] < 0 or reach[1] > self.items.num_items):
            raise UserError(f"score: item ids reach from {reach[0]} to {reach[1]}, outside 0..{self.items.num_items}")
        ids = items.to(queries.states.device)
        scores, _ = self.similarity.score(queries.states, self.get_item_embeddings(ids), queries.user_ids)
        return scores.masked_fill(ids == 0, -torch.inf)

    def states(self, inputs: ModelInputs, rows: ItemRows | None = None, last: bool = False) -> torch.Tensor:
        """``[M, D]`` states at the positions to read. rows: of the item table, all of it unless given. last: at each
        row's last token, ``[B, D]``, instead.

        UserError where a masked model is given no masked position: it predicts nothing at the items that are shown.
        """
        # Histories look up the table itself, also where candidates go through a tower.
        items = self.items.history_rows(self.items.rows(inputs.past_ids) if rows is None else rows)
        x = items.lookup(inputs.past_ids)
        if self.mask_embedding is not None:
            if inputs.replaced is None:
                raise UserError(_NEEDS_MASK_SLOT)
            x = self.mask_embedding(x, inputs.replaced)
        features = inputs.features
        events = token_events(features.past_events, features.past_lengths, inputs.layout, self.constant_width)
        x = rounded(x, self.autocast)
        with nullcontext() if self.autocast is None else dispatch.autocast(x, self.autocast):
            if last:
                return self.sequence.last(x, inputs.layout, events)
            states = self.sequence(x, inputs.layout, events)
        return states if inputs.read is None else states.index_select(0, inputs.read)

    def forward(
        self,
        past_lengths: torch.Tensor,
        past_ids: torch.Tensor,
        past_embeddings: torch.Tensor | None = None,
        past_events: Mapping[str, torch.Tensor] | None = None,
        batch_id: int | None = None,
    ) -> torch.Tensor:
        """Encodes whole rectangles, in causal models. batch_id: part of the published signature, unused there too.

        past_lengths ``[B]``, past_ids ``[B, N]``, past_embeddings ``[B, N, D]`` (looked up when None), past_events: see
        `types.SequentialFeatures`. Returns ``[B, N, D]``: the state after each position, 0 at padding.
        """
        if self.mask_embedding is not None:
            raise UserError(_NEEDS_MASK_SLOT)
        layout = padded_layout(past_lengths, past_ids.shape[1])
        embeddings = self.embed_history(past_ids) if past_embeddings is None else past_embeddings
        events = token_events(past_events or {}, past_lengths, layout, self.constant_width)
        return layout.to_rectangle(self.sequence(layout.flatten(embeddings), layout, events))

    @torch.no_grad()
    def encode_incremental(
        self,
        cache: HistoryCache | None,
        new_lengths: torch.Tensor,
        new_ids: torch.Tensor,
        new_events: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, HistoryCache]:
        """`encode_query` of the cached histories followed by further items, computed on the new items alone.

        cache: that of the last call, None at first. new_lengths ``[B]`` (0: none in this row), new_ids ``[B, M]``;
        new_events: `types.SequentialFeatures`'s of the new items, the same names in every call;
        ``next_timestamps [B]`` where the time of the event to predict is known, 0 otherwise.
        Returns the states ``[B, D]`` and the cache that a later call continues from, in float32 also where the model
        autocasts. No gradients.

        HSTU with ``next_time = "given"`` encodes each row's last old item again, as the time of the event after it is
        known now. UserError: histories that outgrow the window, encoders and objectives that cannot append.
        """
        if self.mask_embedding is not None:
            raise UserError(
                "encode_incremental: the model was built for a masked objective, whose items see later ones; only "
                "causal histories can be appended to"
            )
        per_item = self.sequence.preprocessor.tokens_per_item
        encoded = torch.zeros_like(new_lengths, device="cpu") if cache is None else cache.lengths // per_item
        window = self.sequence.preprocessor.max_length // per_item
        check_append(encoded, new_lengths, new_ids.shape[1], window)
        layout = new_layout(encoded, new_lengths, new_ids.device)
        events = dict(new_events or {})
        if "timestamps" in events:
            events["timestamps"] = F.pad(events["timestamps"], (0, 1))  # a slot after every row: unknown
        if cache is not None and "timestamps" in events and "next_timestamps" in cache.last_events:
            # The time of the event after each row's last item is known now.
            first, following = events["timestamps"][:, 0], events.get("next_timestamps")
            known = first if following is None else first.where(layout.lengths > 0, following)
            cache = replace(cache, last_events=cache.last_events | {"next_timestamps": known})
        items = self.embed_history(layout.flatten(new_ids))
        return self.sequence.append(cache, items, layout, token_events(events, new_lengths, layout))


_NEEDS_MASK_SLOT = (
    "the model was trained to predict masked items: its states come from encode_query, which appends the mask slot"
)
