"""Masked-item prediction: which items of a history are hidden, and what their predictions may attend to.

The discriminator of replaced items is in `replaced`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional as F

from generative_recommenders.config.fields import Length, Probability
from generative_recommenders.config.registry import register_objective
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws, proper_part, uniform
from generative_recommenders.modeling.events import events_with_slot, hidden_events
from generative_recommenders.modeling.inputs import ModelInputs, layout_of
from generative_recommenders.objectives.examples import TrainingExample, make_example
from generative_recommenders.objectives.objective import Objective
from generative_recommenders.ops.layout import AttentionMask, Layout
from generative_recommenders.types import SequentialFeatures

MaskColumns = tuple[Tensor, Tensor]
"""(key ``[B, N]``, query ``[B, N]``) int64: position i attends to j of its own sequence where
``key[j] <= query[i]``."""


class MaskedObjective(Objective):
    """Hidden positions of whole histories are predicted; queries read a mask slot after the history."""

    uses_mask = True
    hidden_are_seen = True
    """Whether visible positions attend to hidden ones too."""

    @abstractmethod
    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        """Positions to hide, ``[B, N]`` bool, among the ``real [B, N]`` ones, and the terms of the attention mask."""

    def first_target(self, batch: LoadedBatch) -> None:
        """None: target counts on other ranks depend on their masks."""
        return

    def example(self, columns: Mapping[str, Tensor], draws: Draws = None) -> TrainingExample:
        item_ids, lengths = columns["item_ids"], columns["lengths"]
        real = torch.arange(item_ids.shape[1], device=lengths.device) < lengths[:, None]
        hidden, mask = self.choose(real, draws)
        features = SequentialFeatures(lengths, item_ids, hidden_events(columns, hidden, lengths))
        layout = masked_layout(features, mask)
        replaced, targets = layout.flatten(hidden), item_ids.where(hidden, 0)
        read = replaced.nonzero()[:, 0]
        example = make_example(features, layout, targets, None, columns["user_ids"], read)
        return replace(example, replaced=replaced)

    def query(self, features: SequentialFeatures, padded: bool = False) -> ModelInputs:
        """The history with a mask slot after its last event, position ``past_lengths [B]``, which is read."""
        lengths, wider = features.past_lengths, F.pad(features.past_ids, (0, 1))
        slot = torch.arange(wider.shape[1], device=wider.device) == lengths[:, None]
        # The stand-in is a copy of the last item, 1 in an empty row: padding's id would hide the slot itself.
        last = wider.gather(1, (lengths - 1).clamp(min=0)[:, None]).clamp(min=1)
        events = events_with_slot(features.past_events, lengths, wider.shape[1])
        features = SequentialFeatures(lengths + 1, torch.where(slot, last, wider), events)
        nothing = torch.zeros_like(wider)
        key = nothing if self.hidden_are_seen else slot.long()
        layout = masked_layout(features, (key, nothing), padded)
        return ModelInputs(
            features=features,
            layout=layout,
            past_ids=layout.flatten(features.past_ids),
            read=layout.starts + lengths.to(layout.device),
            replaced=layout.flatten(slot),
        )


def masked_layout(features: SequentialFeatures, mask: MaskColumns, padded: bool = False) -> Layout:
    """The layout of histories, with their attention mask."""
    layout = layout_of(features.past_lengths, features.past_ids, padded)
    return layout.with_attention_mask(AttentionMask(*(layout.flatten(each) for each in mask)))


@register_objective("masked", gin_name="masked_objective")
class MaskedItemObjective(MaskedObjective):
    """Random items are hidden and predicted from both sides (MLM; BERT4Rec, arXiv 1904.06690, section 3.6).

    In every row one real position, drawn uniformly, is hidden for certain and every other one with the given
    probability; if that hides all of them, one is shown again. So rows of two or more items have at least one
    hidden and one visible item; a row with a single item has no target.

    mask_probability: share of a history that is hidden, beside the one position that always is.
    """

    def __init__(self, mask_probability: Probability = 0.15) -> None:
        self.mask_probability = mask_probability

    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        order, certain = uniform((2, *real.shape), real.device, draws)
        hidden = (order < self.mask_probability) | proper_part(torch.zeros_like(real), real, certain)
        everyone = torch.zeros_like(real, dtype=torch.int64)
        return proper_part(hidden, real, order), (everyone, everyone)


@register_objective("permuted", gin_name="permuted_objective")
class PermutedObjective(MaskedObjective):
    """Spans of items are hidden and predicted in a random order (XLNet, arXiv 1906.08237, section 2), by one attention
    stream.

    Visible items attend to each other. A hidden position attends to the visible items and to the hidden positions
    before it in the order, never to itself; its embedding is the mask embedding, so no item is ever an input of its own
    prediction and the second stream is not needed.

    Walking along a row, a span length is drawn from 1..``max_span_length``, a context of
    ``int(span / mask_probability)`` items is set aside for it, and the span is put at a random place of that context,
    cut at the end of the row. Every row of two or more items has some hidden and some visible; a row with one item has
    no target.

    mask_probability: share of a history that is hidden.
    max_span_length: items of the longest span.
    permute_all: all items but one at random are hidden and predicted, not spans alone.
    """

    hidden_are_seen = False

    def __init__(
        self,
        mask_probability: Annotated[float, Gt(0.0), Le(1.0)] = 1 / 6,
        max_span_length: Length = 5,
        permute_all: bool = False,
    ) -> None:
        self.mask_probability, self.max_span_length = mask_probability, max_span_length
        self.permute_all = permute_all

    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        order = uniform(real.shape, real.device, draws)
        hidden = real if self.permute_all else self.spans(real, draws)
        hidden = proper_part(hidden, real, order)
        rank = order.argsort(1).argsort(1)  # the place of each position in the random order
        # Key and query are 0 for visible items; the hidden one of rank r has key r + 1, above its own query r.
        return hidden, ((rank + 1).where(hidden, 0), rank.where(hidden, 0))

    def spans(self, real: Tensor, draws: Draws) -> Tensor:
        """Random spans of real positions, ``[B, N]`` bool, all rows at once."""
        rows, width = real.shape
        spans = torch.arange(1, self.max_span_length + 1, dtype=torch.float64, device=real.device)
        contexts = (spans / self.mask_probability).clamp(max=2.0**40).long()  # no sum of them overflows
        steps = -(-width // int(contexts[0]))
        lengths = real.sum(1, keepdim=True)
        span_draw, place_draw = uniform((2, rows, steps), real.device, draws)
        span = (span_draw * self.max_span_length).long() + 1
        context = contexts[span - 1]
        begin = context.cumsum(1) - context + (place_draw * (context - span + 1)).long()
        # +1 where a span begins and -1 after its end, so that a running sum is above 0 within spans.
        edges = real.new_zeros(rows, width + 1, dtype=torch.long)
        edges.scatter_add_(1, begin.minimum(lengths), torch.ones_like(begin))
        edges.scatter_add_(1, (begin + span).minimum(lengths), -torch.ones_like(begin))
        return edges.cumsum(1)[:, :width] > 0
