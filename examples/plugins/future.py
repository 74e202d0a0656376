"""Prediction of an item some way ahead (the random all-action task of PinnerFormer, arXiv 2205.04507) as an objective
plug-in.

python main.py --plugin=examples/plugins/future.py --gin_bindings='train_fn.objective = "future"'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Le

from generative_recommenders import register_objective
from generative_recommenders.data.token_masks import Draws, uniform
from generative_recommenders.objectives.causal import CausalObjective
from generative_recommenders.objectives.examples import TrainingExample


@register_objective("future", gin_name="future_objective")
class FutureObjective(CausalObjective):
    """Every position predicts one of the items after it, drawn anew in each step from the next ``horizon``."""

    fixed_shapes = False
    """A step that a GPU captures makes its examples otherwise, and would draw none."""

    def __init__(self, horizon: Annotated[int, Ge(1), Le(1000)] = 10) -> None:
        super().__init__(num_positives=horizon)

    def example(self, columns: Mapping[str, torch.Tensor], draws: Draws = None) -> TrainingExample:
        """Draws are keyed by row, so that processes and resumed runs draw the same."""
        every = super().example(columns, draws)
        targets = every.targets.view(-1, self.num_positives)  # [T, horizon], 0 past a history's end
        width = every.features.past_ids.shape[1]
        share = every.layout.flatten(uniform((len(columns["lengths"]), width), targets.device, draws))
        count = (targets > 0).sum(1, keepdim=True)
        chosen = targets.gather(1, (share[:, None] * count).long())[:, 0]
        return replace(every, targets=chosen, weights=(chosen > 0).float(), ratings=None)
