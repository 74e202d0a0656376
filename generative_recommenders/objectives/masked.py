"""Masked-item prediction: which items of a history are hidden, and what may be attended to where they are predicted.

A scheme turns right-padded histories into a ``MaskedSequence``: ids to look up, positions whose embedding is replaced by the
mask embedding, targets, and the attention mask. Permutation is in `permuted`, the discriminator of replaced items in
`replaced`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from generative_recommenders.config.fields import Probability
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
    """Inputs and targets of one batch under a masking scheme.

    input_ids: ``[B, N]`` int64, right-padded with 0. At replaced positions the id is a stand-in (never 0,
    so that ``input_ids != 0`` still marks the real positions) whose embedding must not be read. replaced:
    ``[B, N]`` bool, positions that receive the mask embedding. lengths: ``[B]`` int64, real positions of
    ``input_ids``. targets: ``[B, N]`` int64, the item to name at each position, 0 = none. attention_mask:
    ``None`` for causal attention.
    """

    input_ids: Tensor
    replaced: Tensor
    lengths: Tensor
    targets: Tensor
    attention_mask: MaskColumns | None


class MaskingScheme(ABC):
    """A training objective: how histories become inputs and targets."""

    @abstractmethod
    def training(self, item_ids: Tensor, lengths: Tensor, draws: Draws = None) -> MaskedSequence:
        """One training pass over histories ``item_ids [B, N]``, ``lengths [B]`` int64."""

    @abstractmethod
    def inference(self, item_ids: Tensor, lengths: Tensor) -> tuple[MaskedSequence, Tensor]:
        """Inputs for naming the item after each history, and the position to read, ``[B]`` int64."""


class MaskedItemMasking(MaskingScheme):
    """Random positions are hidden and named from both sides (MLM; BERT4Rec, arXiv 1904.06690, section 3.6).

    In every row one real position, drawn uniformly, is hidden for certain and every other one with
    ``probability``; if that hides all of them, one is shown again. So rows of two or more items have at
    least one hidden and one visible; a row with a single item has no target. Inference appends a mask slot
    after the last item, which makes the width N + 1, and reads it. Raises ``UserError`` for a probability
    outside [0, 1].
    """

    def __init__(self, probability: float = 0.15) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"masking probability must be between 0 and 1, not {probability}")
        self.probability = probability

    def choose(self, real: Tensor, draws: Draws = None) -> Tensor:
        """Positions to hide, ``[B, N]`` bool, among the ``real [B, N]`` ones."""
        order, certain = uniform((2, *real.shape), real.device, draws)
        hidden = (order < self.probability) | proper_part(torch.zeros_like(real), real, certain)
        return proper_part(hidden, real, order)

    def training(self, item_ids: Tensor, lengths: Tensor, draws: Draws = None) -> MaskedSequence:
        replaced = self.choose(real_positions(lengths, item_ids.shape[1]), draws)
        everyone = torch.zeros_like(item_ids)
        return MaskedSequence(item_ids, replaced, lengths, item_ids.where(replaced, 0), (everyone, everyone))

    def inference(self, item_ids: Tensor, lengths: Tensor) -> tuple[MaskedSequence, Tensor]:
        input_ids, replaced = append_mask_slot(item_ids, lengths)
        everyone = torch.zeros_like(input_ids)
        sequence = MaskedSequence(input_ids, replaced, lengths + 1, everyone, (everyone, everyone))
        return sequence, lengths


class MaskedObjective(Objective):
    """A masking scheme over whole histories: hidden, permuted or replaced positions are predicted.

    Queries read a mask slot behind the history.
    """

    uses_mask = True

    def __init__(self, scheme: MaskingScheme) -> None:
        self.scheme = scheme

    def first_target(self, batch: LoadedBatch) -> None:
        """None: how many targets other processes have depends on what is hidden there."""
        return

    def example(self, columns: Mapping[str, Tensor], draws: Draws = None) -> TrainingExample:
        masked = self.scheme.training(columns["item_ids"], columns["lengths"], draws)
        events = hidden_events(columns, masked.replaced, masked.lengths)
        features = SequentialFeatures(masked.lengths, masked.input_ids, events)
        layout = masked_layout(masked)
        read = layout.flatten(masked.targets).nonzero()[:, 0]
        example = make_example(features, layout, masked.targets, None, columns["user_ids"], read)
        return replace(example, replaced=layout.flatten(masked.replaced))

    def query(self, features: SequentialFeatures, padded: bool = False) -> ModelInputs:
        """The history with a mask slot behind its last event, which is read."""
        masked, read = self.scheme.inference(features.past_ids, features.past_lengths)
        layout = masked_layout(masked, padded)
        width = masked.input_ids.shape[1]
        events = events_with_slot(features.past_events, features.past_lengths, width)
        return ModelInputs(
            features=SequentialFeatures(masked.lengths, masked.input_ids, events),
            layout=layout,
            past_ids=layout.flatten(masked.input_ids),
            read=layout.starts + read.to(layout.device),
            replaced=layout.flatten(masked.replaced),
        )


@register_objective("masked", gin_name="masked_objective")
class MaskedItemObjective(MaskedObjective):
    """Hidden items are named from both sides (BERT4Rec, arXiv 1904.06690), see `MaskedItemMasking`.

    mask_probability: share of a history that is hidden, beside the one position that always is.
    """

    def __init__(self, mask_probability: Probability = 0.15) -> None:
        super().__init__(MaskedItemMasking(mask_probability))


def masked_layout(masked: MaskedSequence, padded: bool = False) -> Layout:
    """The layout of a masked sequence, with its attention mask."""
    layout = layout_of(masked.lengths, masked.input_ids, padded)
    if masked.attention_mask is None:
        return layout
    return layout.with_attention_mask(AttentionMask(*(layout.flatten(x) for x in masked.attention_mask)))


def apply_mask_to_inputs(embeddings: Tensor, replaced: Tensor, mask_embedding: Tensor) -> Tensor:
    """``mask_embedding [D]`` where ``replaced [...]``, else ``embeddings [..., D]``."""
    return torch.where(replaced[..., None], mask_embedding.to(embeddings.dtype), embeddings)


def real_positions(lengths: Tensor, width: int) -> Tensor:
    """``[B, width]`` bool: positions before each row's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def next_items(item_ids: Tensor, padding: int = 0) -> Tensor:
    """``[B, N]``: each position's following item, ``padding`` at the last column."""
    return nn.functional.pad(item_ids[:, 1:], (0, 1), value=padding)


def keep_last(values: Tensor, lengths: Tensor, padding: int = 0) -> Tensor:
    """``values [B, N]`` at each row's last real position, ``padding`` everywhere else."""
    last = torch.arange(values.shape[1], device=values.device) == lengths[:, None] - 1
    return values.where(last, padding)


def append_mask_slot(item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Histories one column wider with a slot after the last item: (ids, slot), ``[B, N + 1]`` int64 and bool.

    The slot's stand-in id is a copy of the last item (1 for an empty row); see ``MaskedSequence``.
    """
    wider = nn.functional.pad(item_ids, (0, 1))
    slot = torch.arange(wider.shape[1], device=item_ids.device) == lengths[:, None]
    last = wider.gather(1, (lengths - 1).clamp(min=0)[:, None]).clamp(min=1)
    return torch.where(slot, last, wider), slot
