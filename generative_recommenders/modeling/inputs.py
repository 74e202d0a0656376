"""Inputs of a retriever: histories as tokens, the positions to read, and the base of what makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from generative_recommenders.ops.layout import Layout, jagged_layout, moved, padded_layout
from generative_recommenders.types import SequentialFeatures


class Queries(NamedTuple):
    """Queries that items are scored against. states: ``[B, D]`` float32. user_ids: ``[B]`` int64, or None where
    unknown."""

    states: torch.Tensor
    user_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Histories as a model reads them.

    features, layout: the histories and where their T tokens lie. past_ids: ``[T]`` items of those tokens. read: ``[M]``
    int64 tokens whose states are read, or None for all T in order. replaced: ``[T]`` bool, tokens that get the mask
    embedding instead of their item's, or None where there are none.
    """

    features: SequentialFeatures
    layout: Layout
    past_ids: torch.Tensor
    read: torch.Tensor | None = None
    replaced: torch.Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same on another device; copies from pinned memory do not wait."""
        return moved(self, device)


class QueryReader(ABC):
    """The part of an objective that a model needs to encode queries."""

    uses_mask = False
    """Whether predicted positions hold the mask embedding, so that a query needs a mask slot and the attention mask is
    the objective's."""

    @abstractmethod
    def query(self, features: SequentialFeatures, padded: bool = False) -> ModelInputs:
        """Inputs with one position to read in each row, whose state predicts the next item; ``read`` may be None for
        each row's last token.

        padded: in a layout of whole rectangles, which can be exported.
        """


class LastEventReader(QueryReader):
    """Queries of causal models: the state after each row's last event."""

    def query(self, features: SequentialFeatures, padded: bool = False) -> ModelInputs:
        """The history as it is."""
        return history_inputs(features, padded)


def history_inputs(features: SequentialFeatures, padded: bool = False) -> ModelInputs:
    """All real tokens of the histories, each attending to those before it."""
    layout = layout_of(features.past_lengths, features.past_ids, padded)
    return ModelInputs(features=features, layout=layout, past_ids=layout.flatten(features.past_ids))


def layout_of(lengths: torch.Tensor, ids: torch.Tensor, padded: bool) -> Layout:
    """The layout of histories ``ids [B, N]``: of their real tokens, or of the whole rectangle."""
    width = ids.shape[1]
    return padded_layout(lengths, width) if padded else jagged_layout(lengths, width, ids.device)
