"""Next-item prediction: every position, or the last alone, predicts what follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from generative_recommenders.config.fields import SmallCount
from generative_recommenders.config.registry import register_objective
from generative_recommenders.data.batch_transforms import next_token_batch
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import past_features
from generative_recommenders.modeling.inputs import LastEventReader
from generative_recommenders.objectives.examples import TrainingExample, make_example
from generative_recommenders.objectives.objective import Objective
from generative_recommenders.ops.layout import Layout, device_layout, jagged_layout


@register_objective("causal", gin_name="causal_objective")
class CausalObjective(LastEventReader, Objective):
    """Every position predicts the next item (CLM).

    num_positives: P, how many next items are predicted (the dense all-action loss of PinnerFormer, arXiv 2205.04507,
    over a count instead of a time).
    target_weights: weight of a target in the loss, the same for all or its rating.
    """

    last_only = False

    def __init__(self, num_positives: SmallCount = 1, target_weights: Literal["equal", "rating"] = "equal") -> None:
        self.num_positives, self.target_weights = num_positives, target_weights

    @property
    def fixed_shapes(self) -> bool:  # type: ignore[override]
        return not self.last_only and self.target_weights == "equal"

    def first_target(self, batch: LoadedBatch) -> int:
        """Targets are numbered by row, of those that have one, or by token."""
        return batch.first_last_target if self.last_only else batch.first_token

    def example(self, columns: Mapping[str, torch.Tensor], draws: Draws = None) -> TrainingExample:
        return self._example(columns, jagged_layout)

    def device_example(self, columns: Mapping[str, torch.Tensor], num_tokens: int) -> TrainingExample:
        return self._example(columns, partial(device_layout, num_tokens=num_tokens))

    def _example(
        self, columns: Mapping[str, torch.Tensor], layout_of: Callable[[torch.Tensor, int], Layout]
    ) -> TrainingExample:
        batch = next_token_batch(columns)
        features = past_features(batch)
        layout = layout_of(features.past_lengths, features.past_ids.shape[1])
        read = layout.last_tokens[layout.lengths > 0] if self.last_only else None
        ids, ratings = batch["target_ids"], batch.get("target_ratings")
        if self.num_positives > 1:
            lengths, count = features.past_lengths, self.num_positives
            ids = following(ids, lengths, count)
            ratings = None if ratings is None else following(ratings, lengths, count)
        example = make_example(features, layout, ids, ratings, batch["user_ids"], read)
        if self.target_weights == "equal":
            return example
        if example.ratings is None:
            raise UserError('train_fn.target_weights "rating": the data have no ratings')
        return replace(example, weights=example.weights * example.ratings.clamp(min=0))


@register_objective("causal_last", gin_name="causal_last_objective")
class CausalLastObjective(CausalObjective):
    """The last position alone predicts the next item."""

    last_only = True


def following(values: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, N, count]``: each place of ``values [B, N]`` and those after it, 0 beyond a row's length."""
    width = values.shape[1]
    values = values * (torch.arange(width, device=values.device) < lengths[:, None])
    return F.pad(values, (0, count - 1)).unfold(1, count, 1)
