"""Replaced-token detection (ELECTRA, arXiv 2003.10555, section 2): a generator fakes items, a discriminator
finds them."""

from __future__ import annotations

import torch
from torch import Tensor

from generative_recommenders.features import UserError
from generative_recommenders.objectives.masking import MaskedItemMasking, MaskedSequence


class ReplacementMasking(MaskedItemMasking):
    """The generator learns like ``MaskedItemMasking``; its samples replace the hidden items for the
    discriminator.

    A step: ``training`` gives the generator's inputs and targets; ``fake_items`` samples an item for every
    hidden position from the generator's softmax; ``replace`` puts them into the histories and labels each
    position. sample_from_batch: fakes are drawn among the batch's own hidden items instead of the whole
    catalogue. block_size: catalogue rows scored at a time. Raises ``UserError`` for options out of range.
    """

    def __init__(
        self, probability: float = 0.15, sample_from_batch: bool = False, block_size: int = 65536
    ) -> None:
        super().__init__(probability)
        if block_size < 1:
            raise UserError(f"block_size must be at least 1, not {block_size}")
        self.sample_from_batch = sample_from_batch
        self.block_size = block_size

    def fake_items(
        self, hidden: Tensor, item_weight: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples one id per hidden position from softmax(hidden . item), ``[P]`` int64, without gradients.

        hidden: ``[P, D]`` generator states of the hidden positions, row by row; item_weight: ``[V, D]``,
        row i is item id i + 1; targets: ``[P]`` their true items.
        """
        if not self.sample_from_batch:
            return sample_from_catalogue(hidden, item_weight, generator, self.block_size)
        candidates = targets.unique()
        drawn = sample_from_catalogue(hidden, item_weight[candidates - 1], generator, self.block_size)
        return candidates[drawn - 1]

    def replace(self, sequence: MaskedSequence, fakes: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's inputs ``[B, N]`` int64 and labels ``[B, N]`` bool, see ``replace_items``."""
        return replace_items(sequence.input_ids, sequence.replaced, fakes)


def replace_items(item_ids: Tensor, replaced: Tensor, fakes: Tensor) -> tuple[Tensor, Tensor]:
    """Puts ``fakes [P]`` at the True places of ``replaced [B, N]``, in row-major order.

    Returns (ids ``[B, N]``, labels ``[B, N]`` bool): True where the item is no longer the original one. A
    fake that happens to be the true item counts as original.
    """
    corrupted = item_ids.masked_scatter(replaced, fakes)
    return corrupted, corrupted != item_ids


def gumbel_like(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape of ``logits``, float32: -ln of an exponential draw."""
    device = logits.device if generator is None else generator.device
    draws = torch.empty(logits.shape, dtype=torch.float32, device=device).exponential_(generator=generator)
    return -draws.clamp(min=torch.finfo(draws.dtype).tiny).log().to(logits.device)


def sample_from_softmax(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index per row of ``logits [P, V]``, distributed as their softmax (Gumbel-max), ``[P]`` int64."""
    return (logits + gumbel_like(logits, generator)).argmax(-1)


@torch.no_grad()
def sample_from_catalogue(
    hidden: Tensor, item_weight: Tensor, generator: torch.Generator | None = None, block_size: int = 65536
) -> Tensor:
    """One item id (1..V) per row, distributed as softmax(hidden . item); at most ``[P, block_size]`` is held.

    hidden: ``[P, D]``; item_weight: ``[V, D]``, row i is item id i + 1. The maximum of logits plus Gumbel
    noise is kept while walking over blocks of the catalogue.
    """
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    items = torch.ones(len(hidden), dtype=torch.long, device=hidden.device)
    for start in range(0, len(item_weight), block_size):
        logits = hidden @ item_weight[start : start + block_size].T
        score, index = (logits + gumbel_like(logits, generator)).max(-1)
        items = torch.where(score > best, index + start + 1, items)
        best = torch.maximum(best, score)
    return items
