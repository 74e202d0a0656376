"""Masking schemes: what a model sees of a history, and which items it has to name.

A scheme turns right-padded histories into a ``MaskedSequence``: ids to look up, positions whose embedding
is replaced by a learned mask embedding, targets, and who sees whom. The masked scheme is here, permutation in
``permutation.py``; next items need none, see ``training_examples.CausalObjective``, and replaced-token detection is
the masked scheme with a discriminator, see ``replaced_detection.py``. Random draws come from a ``torch.Generator``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generative_recommenders.data.token_masks import proper_part, uniform
from generative_recommenders.errors import UserError

Visibility = tuple[Tensor, Tensor]
"""(key ``[B, N]``, query ``[B, N]``) int64: position i sees j of its own sequence where ``key[j] <=
query[i]``."""


@dataclass(frozen=True)
class MaskedSequence:
    """Inputs and targets of one batch under a masking scheme.

    input_ids: ``[B, N]`` int64, right-padded with 0. At replaced positions the id is a stand-in (never 0,
    so that ``input_ids != 0`` still marks the real positions) whose embedding must not be read. replaced:
    ``[B, N]`` bool, positions that receive the mask embedding. lengths: ``[B]`` int64, real positions of
    ``input_ids``. targets: ``[B, N]`` int64, the item to name at each position, 0 = none. visibility: who
    sees whom, ``None`` for causal attention.
    """

    input_ids: Tensor
    replaced: Tensor
    lengths: Tensor
    targets: Tensor
    visibility: Visibility | None


class MaskingScheme(ABC):
    """A training objective: how histories become inputs and targets."""

    @abstractmethod
    def training(
        self, item_ids: Tensor, lengths: Tensor, generator: torch.Generator | None = None
    ) -> MaskedSequence:
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

    def choose(self, real: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Positions to hide, ``[B, N]`` bool, among the ``real [B, N]`` ones."""
        draws, certain = uniform((2, *real.shape), real.device, generator)
        hidden = (draws < self.probability) | proper_part(torch.zeros_like(real), real, certain)
        return proper_part(hidden, real, draws)

    def training(
        self, item_ids: Tensor, lengths: Tensor, generator: torch.Generator | None = None
    ) -> MaskedSequence:
        replaced = self.choose(real_positions(lengths, item_ids.shape[1]), generator)
        everyone = torch.zeros_like(item_ids)
        return MaskedSequence(item_ids, replaced, lengths, item_ids.where(replaced, 0), (everyone, everyone))

    def inference(self, item_ids: Tensor, lengths: Tensor) -> tuple[MaskedSequence, Tensor]:
        input_ids, replaced = append_mask_slot(item_ids, lengths)
        everyone = torch.zeros_like(input_ids)
        sequence = MaskedSequence(input_ids, replaced, lengths + 1, everyone, (everyone, everyone))
        return sequence, lengths


class MaskEmbedding(nn.Module):
    """The learned vector that stands for a hidden item, ``weight [D]``, drawn from a normal of ``std``."""

    def __init__(self, embedding_dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embedding_dim).normal_(std=std))

    def forward(self, embeddings: Tensor, replaced: Tensor) -> Tensor:
        """``embeddings [..., D]`` (rectangles or jagged) with those at ``replaced [...]`` exchanged."""
        return apply_mask_to_inputs(embeddings, replaced, self.weight)


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
