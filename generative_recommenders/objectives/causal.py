"""Next-item prediction: every position, or the last alone, predicts what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from generative_recommenders.data.batch_transforms import next_token_batch
from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.data.token_masks import Draws
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import past_features
from generative_recommenders.modeling.inputs import LastEventReader
from generative_recommenders.objectives.examples import TrainingExample, make_example
from generative_recommenders.ops.layout import jagged_layout


class CausalObjective(LastEventReader):
    """Every position predicts the next item (CLM); last_only: the last position alone.

    num_positives: P, the next so many items (the dense all-action loss of PinnerFormer, arXiv 2205.04507, over a count
    instead of a time). weigh_by_rating: a target weighs its rating. columns, see `data.loader.LoadedBatch`, are
    split by `data.batch_transforms.next_token_batch`.
    """

    def __init__(
        self, last_only: bool = False, num_positives: int = 1, weigh_by_rating: bool = False
    ) -> None:
        self.last_only, self.num_positives, self.weigh_by_rating = last_only, num_positives, weigh_by_rating

    def first_target(self, batch: LoadedBatch) -> int:
        """Targets are numbered by row, or by token."""
        return batch.first_row if self.last_only else batch.first_token

    def example(self, columns: Mapping[str, torch.Tensor], draws: Draws = None) -> TrainingExample:
        batch = next_token_batch(columns)
        features = past_features(batch)
        layout = jagged_layout(features.past_lengths, features.past_ids.shape[1])
        read = layout.last_tokens[layout.lengths > 0] if self.last_only else None
        ids, ratings = batch["target_ids"], batch.get("target_ratings")
        if self.num_positives > 1:
            ids = following(ids, features.past_lengths, self.num_positives)
            ratings = (
                ratings if ratings is None else following(ratings, features.past_lengths, self.num_positives)
            )
        example = make_example(features, layout, ids, ratings, batch["user_ids"], read)
        if not self.weigh_by_rating:
            return example
        if example.ratings is None:
            raise UserError('train_fn.target_weights "rating": the data have no ratings')
        return replace(example, weights=example.weights * example.ratings.clamp(min=0))


def following(values: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, N, count]``: each place of ``values [B, N]`` and those behind it, 0 beyond a row's length."""
    width = values.shape[1]
    values = values * (torch.arange(width, device=values.device) < lengths[:, None])
    return F.pad(values, (0, count - 1)).unfold(1, count, 1)
