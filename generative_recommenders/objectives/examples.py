"""Training examples: the inputs, positions to read, targets and weights that an objective makes of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.modeling.inputs import ModelInputs, QueryReader
from generative_recommenders.ops.layout import Layout
from generative_recommenders.types import SequentialFeatures


@dataclass(frozen=True, kw_only=True)
class TrainingExample(ModelInputs):
    """What a step learns from.

    targets: ``[M]`` item ids, or ``[M, P]`` where a position predicts several. weights, ratings (or None): float32, of the
    targets, like them. users: ``[M]`` ids.
    """

    targets: torch.Tensor
    weights: torch.Tensor
    users: torch.Tensor
    ratings: torch.Tensor | None = None


class Objective(QueryReader, Protocol):
    """What a model learns to predict, and how it is asked for the next item afterwards."""

    def example(self, columns: Mapping[str, torch.Tensor], draws: Draws) -> TrainingExample:
        """columns: of `data.loader.LoadedBatch`. draws: what random choices come from."""

    def first_target(self, batch: LoadedBatch) -> int | None:
        """Number of the process's first target in the global batch; None where only counting targets tells."""


def make_example(
    features: SequentialFeatures,
    layout: Layout,
    target_ids: torch.Tensor,
    target_ratings: torch.Tensor | None,
    user_ids: torch.Tensor,
    read: torch.Tensor | None,
) -> TrainingExample:
    """target_ids and target_ratings: ``[B, N]`` or ``[B, N, P]``, beside the positions; user_ids ``[B]``."""
    rows = layout.row_of if read is None else layout.row_of[read]
    pick = layout.flatten if read is None else (lambda x: layout.flatten(x)[read])
    targets = pick(target_ids)
    return TrainingExample(
        features=features,
        layout=layout,
        past_ids=layout.flatten(features.past_ids),
        targets=targets,
        weights=(targets > 0).float(),
        users=user_ids[rows],
        read=read,
        ratings=None if target_ratings is None else pick(target_ratings),
    )
