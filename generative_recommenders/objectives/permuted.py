"""Permutation language modelling (XLNet, arXiv 1906.08237, section 2), without a second attention stream."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from generative_recommenders.config.fields import Length
from generative_recommenders.config.registry import register_objective
from generative_recommenders.data.token_masks import Draws, proper_part, uniform
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.masked import (
    MaskColumns,
    MaskedObjective,
    MaskedSequence,
    MaskingScheme,
    append_mask_slot,
    real_positions,
)


class PermutationMasking(MaskingScheme):
    """Spans of items are hidden and named in a random order.

    Visible items attend to each other. A hidden position attends to the visible items and to the hidden positions before it in
    the order, never to itself; its embedding is the mask embedding, so no item is ever an input of its own prediction and one
    stream is enough. As two integers: key 0 and query 0 for visible items, key r + 1 and query r for the hidden one of rank r.

    Spans: walking along a row, a span length is drawn from 1..``max_span_length``, a context of ``int(span
    / probability)`` items is set aside for it, and the span is put at a random place of that context, cut
    at the end of the row. Every row of two or more items has some hidden and some visible; a row with one
    item has no target. permute_all: everything but one random item is hidden. Raises ``UserError`` for a
    probability outside (0, 1] or a span below 1.
    """

    def __init__(
        self, probability: float = 1 / 6, max_span_length: int = 5, permute_all: bool = False
    ) -> None:
        if not 0 < probability <= 1:
            raise UserError(f"permutation probability must be above 0 and at most 1, not {probability}")
        if max_span_length < 1:
            raise UserError(f"max_span_length must be at least 1, not {max_span_length}")
        self.probability = probability
        self.max_span_length = max_span_length
        self.permute_all = permute_all

    def choose(self, real: Tensor, draws: Draws = None) -> tuple[Tensor, MaskColumns]:
        """Positions to hide among ``real [B, N]`` (right-padded rows), and the terms of the attention mask."""
        order = uniform(real.shape, real.device, draws)
        hidden = real if self.permute_all else self._spans(real, draws)
        hidden = proper_part(hidden, real, order)
        rank = order.argsort(1).argsort(1)
        return hidden, ((rank + 1).where(hidden, 0), rank.where(hidden, 0))

    def _spans(self, real: Tensor, draws: Draws) -> Tensor:
        """Random spans of real positions, ``[B, N]`` bool, all rows at once."""
        rows, width = real.shape
        spans = torch.arange(1, self.max_span_length + 1, dtype=torch.float64, device=real.device)
        contexts = (spans / self.probability).clamp(max=2.0**40).long()  # no sum of them overflows
        steps = -(-width // int(contexts[0]))
        lengths = real.sum(1, keepdim=True)
        span_draw, place_draw = uniform((2, rows, steps), real.device, draws)
        span = (span_draw * self.max_span_length).long() + 1
        context = contexts[span - 1]
        begin = context.cumsum(1) - context + (place_draw * (context - span + 1)).long()
        edges = real.new_zeros(rows, width + 1, dtype=torch.long)
        edges.scatter_add_(1, begin.minimum(lengths), torch.ones_like(begin))
        edges.scatter_add_(1, (begin + span).minimum(lengths), -torch.ones_like(begin))
        return edges.cumsum(1)[:, :width] > 0

    def training(self, item_ids: Tensor, lengths: Tensor, draws: Draws = None) -> MaskedSequence:
        hidden, attention_mask = self.choose(real_positions(lengths, item_ids.shape[1]), draws)
        return MaskedSequence(item_ids, hidden, lengths, item_ids.where(hidden, 0), attention_mask)

    def inference(self, item_ids: Tensor, lengths: Tensor) -> tuple[MaskedSequence, Tensor]:
        """The mask slot after the last item is the only hidden position: it attends to all items, none attends to it."""
        input_ids, slot = append_mask_slot(item_ids, lengths)
        nothing = torch.zeros_like(input_ids)
        return MaskedSequence(input_ids, slot, lengths + 1, nothing, (slot.long(), nothing)), lengths


@register_objective("permuted", gin_name="permuted_objective")
class PermutedObjective(MaskedObjective):
    """Spans of items are named in a random order (XLNet, arXiv 1906.08237), see `PermutationMasking`.

    mask_probability: share of a history that is hidden.
    max_span_length: items of the longest span.
    permute_all: every item is hidden and named, not spans alone.
    """

    def __init__(
        self,
        mask_probability: Annotated[float, Gt(0.0), Le(1.0)] = 1 / 6,
        max_span_length: Length = 5,
        permute_all: bool = False,
    ) -> None:
        super().__init__(PermutationMasking(mask_probability, max_span_length, permute_all))
