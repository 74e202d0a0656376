"""Training examples: the inputs, positions to read, targets and weights that an objective makes of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from generative_recommenders.modeling.inputs import ModelInputs
from generative_recommenders.ops.layout import Layout
from generative_recommenders.types import SequentialFeatures


@dataclass(frozen=True, kw_only=True)
class TrainingExample(ModelInputs):
    """Training example of a step.

    targets: ``[M]`` item ids, or ``[M, P]`` where a position predicts several. weights, ratings (or None): float32, of
    the targets, like them. users: ``[M]`` ids. shown_events: where items are hidden, `features.past_events` as if none
    were, if the objective needs them.
    """

    targets: torch.Tensor
    weights: torch.Tensor
    users: torch.Tensor
    ratings: torch.Tensor | None = None
    shown_events: dict[str, torch.Tensor] | None = None


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
