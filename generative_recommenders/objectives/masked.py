"""Masked-item prediction: which items of a history are hidden, and what may be attended to where they are predicted.

The discriminator of replaced items is in `replaced`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional as F

from generative_recommenders.config.fields import Length, Probability
from generative_recommenders.config.registry import register_objective
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws, proper_part, uniform
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import events_with_slot, hidden_events
from generative_recommenders.modeling.inputs import ModelInputs, layout_of
from generative_recommenders.objectives.examples import TrainingExample, make_example
from generative_recommenders.objectives.objective import Objective
from generative_recommenders.ops.layout import AttentionMask, Layout
from generative_recommenders.types import SequentialFeatures

MaskColumns = tuple[Tensor, Tensor]
"""(key ``[B, N]``, query ``[B, N]``) int64: position i attends to j of its own sequence where ``key[j] <= query[i]``."""


@dataclass(frozen=True)
class MaskedSequence:
    """Inputs and targets of one batch of histories.

    input_ids: ``[B, N]`` int64, right-padded with 0. At replaced positions the id is a stand-in (never 0,
    so that ``input_ids != 0`` still marks the real positions) whose embedding must not be read. replaced:
    ``[B, N]`` bool, positions that receive the mask embedding. lengths: ``[B]`` int64, real positions of
    ``input_ids``. targets: ``[B, N]`` int64, the item to name at each position, 0 = none.
    """

    input_ids: Tensor
    replaced: Tensor
    lengths: Tensor
    targets: Tensor
    attention_mask: MaskColumns


class MaskedObjective(Objective):
    """Hidden positions of whole histories are predicted; queries read a mask slot behind the history."""

    uses_mask = True
    hidden_are_seen = True
    """Whether shown positions attend to hidden ones, as to all."""

    @abstractmethod
    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        """Positions to hide, ``[B, N]`` bool, among the ``real [B, N]`` ones, and the terms of the attention mask."""

    def training(self, item_ids: Tensor, lengths: Tensor, draws: Draws = None) -> MaskedSequence:
        """One training pass over histories ``item_ids [B, N]``, ``lengths [B]`` int64."""
        real = torch.arange(item_ids.shape[1], device=lengths.device) < lengths[:, None]
        hidden, mask = self.choose(real, draws)
        return MaskedSequence(item_ids, hidden, lengths, item_ids.where(hidden, 0), mask)

    def inference(self, item_ids: Tensor, lengths: Tensor) -> MaskedSequence:
        """Histories one column wider, with a mask slot after the last item, position ``lengths [B]``, to name what follows."""
        wider = F.pad(item_ids, (0, 1))
        slot = torch.arange(wider.shape[1], device=item_ids.device) == lengths[:, None]
        # The stand-in is a copy of the last item, 1 in an empty row: padding's id would hide the slot itself.
        last = wider.gather(1, (lengths - 1).clamp(min=0)[:, None]).clamp(min=1)
        ids, nothing = torch.where(slot, last, wider), torch.zeros_like(wider)
        key = nothing if self.hidden_are_seen else slot.long()
        return MaskedSequence(ids, slot, lengths + 1, nothing, (key, nothing))

    def first_target(self, batch: LoadedBatch) -> None:
        """None: how many targets other processes have depends on what is hidden there."""
        return

    def example(self, columns: Mapping[str, Tensor], draws: Draws = None) -> TrainingExample:
        masked = self.training(columns["item_ids"], columns["lengths"], draws)
        events = hidden_events(columns, masked.replaced, masked.lengths)
        features = SequentialFeatures(masked.lengths, masked.input_ids, events)
        layout = masked_layout(masked)
        read = layout.flatten(masked.targets).nonzero()[:, 0]
        example = make_example(features, layout, masked.targets, None, columns["user_ids"], read)
        return replace(example, replaced=layout.flatten(masked.replaced))

    def query(self, features: SequentialFeatures, padded: bool = False) -> ModelInputs:
        """The history with a mask slot behind its last event, which is read."""
        lengths = features.past_lengths
        masked = self.inference(features.past_ids, lengths)
        layout = masked_layout(masked, padded)
        events = events_with_slot(features.past_events, lengths, masked.input_ids.shape[1])
        return ModelInputs(
            features=SequentialFeatures(masked.lengths, masked.input_ids, events),
            layout=layout,
            past_ids=layout.flatten(masked.input_ids),
            read=layout.starts + lengths.to(layout.device),
            replaced=layout.flatten(masked.replaced),
        )


def masked_layout(masked: MaskedSequence, padded: bool = False) -> Layout:
    """The layout of a masked sequence, with its attention mask."""
    layout = layout_of(masked.lengths, masked.input_ids, padded)
    return layout.with_attention_mask(AttentionMask(*(layout.flatten(x) for x in masked.attention_mask)))


@register_objective("masked", gin_name="masked_objective")
class MaskedItemObjective(MaskedObjective):
    """Random items are hidden and named from both sides (MLM; BERT4Rec, arXiv 1904.06690, section 3.6).

    In every row one real position, drawn uniformly, is hidden for certain and every other one by the given share; if that
    hides all of them, one is shown again. So rows of two or more items have at least one hidden and one visible; a row with
    a single item has no target.

    mask_probability: share of a history that is hidden, beside the one position that always is.
    """

    def __init__(self, mask_probability: Probability = 0.15) -> None:
        if not 0 <= mask_probability <= 1:
            raise UserError(f"masking probability must be between 0 and 1, not {mask_probability}")
        self.mask_probability = mask_probability

    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        order, certain = uniform((2, *real.shape), real.device, draws)
        hidden = (order < self.mask_probability) | proper_part(torch.zeros_like(real), real, certain)
        everyone = torch.zeros_like(real, dtype=torch.int64)
        return proper_part(hidden, real, order), (everyone, everyone)


@register_objective("permuted", gin_name="permuted_objective")
class PermutedObjective(MaskedObjective):
    """Spans of items are hidden and named in a random order (XLNet, arXiv 1906.08237, section 2), by one attention stream.

    Visible items attend to each other. A hidden position attends to the visible items and to the hidden positions before it in
    the order, never to itself; its embedding is the mask embedding, so no item is ever an input of its own prediction and the
    second stream is not needed.

    Walking along a row, a span length is drawn from 1..``max_span_length``, a context of ``int(span / mask_probability)`` items
    is set aside for it, and the span is put at a random place of that context, cut at the end of the row. Every row of two or
    more items has some hidden and some visible; a row with one item has no target.

    mask_probability: share of a history that is hidden.
    max_span_length: items of the longest span.
    permute_all: every item but one at random is hidden and named, not spans alone.
    """

    hidden_are_seen = False

    def __init__(
        self,
        mask_probability: Annotated[float, Gt(0.0), Le(1.0)] = 1 / 6,
        max_span_length: Length = 5,
        permute_all: bool = False,
    ) -> None:
        if not 0 < mask_probability <= 1:
            raise UserError(f"permutation probability must be above 0 and at most 1, not {mask_probability}")
        if max_span_length < 1:
            raise UserError(f"max_span_length must be at least 1, not {max_span_length}")
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
        # +1 where a span begins and -1 behind its end, so that a running sum is above 0 within spans.
        edges = real.new_zeros(rows, width + 1, dtype=torch.long)
        edges.scatter_add_(1, begin.minimum(lengths), torch.ones_like(begin))
        edges.scatter_add_(1, (begin + span).minimum(lengths), -torch.ones_like(begin))
        return edges.cumsum(1)[:, :width] > 0
