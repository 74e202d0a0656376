"""RePlay's postprocessors of scores, before these are ranked or shown."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from generative_recommenders.compat.replay.nn.transform import TensorBatch, require_tensor
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.catalogue import is_label

__all__ = ["PostprocessorBase", "SeenItemsFilter"]


class PostprocessorBase(ABC):
    """Changes scores ``[B, C]``, knowing the batch that they were computed from. Returns new scores."""

    @abstractmethod
    def on_prediction(self, batch: TensorBatch, logits: Tensor) -> Tensor:
        """The scores of a prediction."""

    @abstractmethod
    def on_validation(self, batch: TensorBatch, logits: Tensor) -> Tensor:
        """The scores that metrics are computed from."""


class SeenItemsFilter(PostprocessorBase):
    """Sets the scores of items that a user has already seen to -inf, in a copy of the scores.

    item_count: number of items; ids outside 0..item_count-1 in ``seen_items_column [B, S]`` are padding. candidates:
    None where column j of the scores is item j; else the item of each column, ``[C]`` for all rows or ``[B, C]`` row by
    row.
    """

    def __init__(self, item_count: int, seen_items_column: str = "seen_ids") -> None:
        if item_count < 1:
            raise UserError(f"SeenItemsFilter: item_count must be positive, not {item_count}")
        self.item_count = item_count
        self.seen_items_column = seen_items_column
        self.candidates: Tensor | None = None

    def on_prediction(self, batch: TensorBatch, logits: Tensor) -> Tensor:
        """``logits [B, C]`` with the seen items of ``batch`` at -inf; ``UserError`` where the shapes disagree."""
        seen_ids = require_tensor(batch, self.seen_items_column, "SeenItemsFilter")
        if seen_ids.dim() != 2 or logits.dim() != 2 or len(seen_ids) != len(logits):
            raise UserError(
                f"SeenItemsFilter: '{self.seen_items_column}' {tuple(seen_ids.shape)} must be [B, S] for "
                f"scores [B, C], here {tuple(logits.shape)}"
            )
        items, num_items = self.candidates, self.item_count
        if (wanted := num_items if items is None else items.shape[-1]) != logits.shape[1]:
            raise UserError(f"SeenItemsFilter: {logits.shape[1]} scores a row for {wanted} items")
        seen_ids = seen_ids.to(logits.device)
        seen = is_label(seen_ids.masked_fill((seen_ids < 0) | (seen_ids >= num_items), -1), num_items)
        if items is not None:
            if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < num_items:
                raise UserError(f"SeenItemsFilter: candidates must be between 0 and {num_items - 1}")
            seen = seen.gather(1, items.to(logits.device).expand(len(logits), -1))
        return logits.masked_fill(seen, -torch.inf)

    def on_validation(self, batch: TensorBatch, logits: Tensor) -> Tensor:
        return self.on_prediction(batch, logits)
