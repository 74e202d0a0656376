"""An objective turns a loaded batch into inputs, positions to read, targets and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from generative_recommenders.data.batch_transforms import default_sasrec_transforms
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import hidden_events, past_features
from generative_recommenders.objectives.masked import MaskedSequence, MaskingScheme
from generative_recommenders.ops.layout import Layout, Visibility, jagged_layout
from generative_recommenders.types import SequentialFeatures


@dataclass(frozen=True)
class TrainingExample:
    """What a step learns from.

    features, layout: the histories and where their T tokens lie. past_ids: ``[T]`` items of those tokens.
    read: ``[M]`` int64 tokens whose state predicts, or None for all T in order. targets: ``[M]`` item ids, or ``[M, P]``
    where a position predicts several. weights, ratings (or None): float32, of the targets, like them. users: ``[M]`` ids.
    replaced: ``[T]`` bool, tokens whose embedding is the mask embedding, or None.
    """

    features: SequentialFeatures
    layout: Layout
    past_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    users: torch.Tensor
    read: torch.Tensor | None = None
    ratings: torch.Tensor | None = None
    replaced: torch.Tensor | None = None

    def to(self, device: torch.device) -> TrainingExample:
        """The same on another device; copies from pinned memory do not wait."""
        return _move(self, device)


class CausalObjective:
    """Every position predicts the next item (CLM); last_only: the last position alone.

    num_positives: P, the next so many items (the dense all-action loss of PinnerFormer, arXiv 2205.04507, over a count
    instead of a time). weigh_by_rating: a target weighs its rating. columns, see `data.batching.LoadedBatch`, go
    through the default training transforms of `data.batch_transforms`.
    """

    stochastic = False

    def __init__(
        self, last_only: bool = False, num_positives: int = 1, weigh_by_rating: bool = False
    ) -> None:
        self.last_only, self.num_positives, self.weigh_by_rating = last_only, num_positives, weigh_by_rating
        self.transform = default_sasrec_transforms()["train"]

    def first_target(self, first_row: int, first_token: int) -> int:
        """Number of a process's first target in the global batch."""
        return first_row if self.last_only else first_token

    def example(self, columns: Mapping[str, torch.Tensor], generator: torch.Generator) -> TrainingExample:
        batch = self.transform(columns)
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


class MaskedObjective:
    """A masking scheme over whole histories: hidden, permuted or replaced positions are predicted."""

    stochastic = True

    def __init__(self, scheme: MaskingScheme) -> None:
        self.scheme = scheme

    def first_target(self, first_row: int, first_token: int) -> int:
        """Any number that no other process's targets reach: what is hidden is drawn by each process for itself."""
        return first_row << 20

    def example(self, columns: Mapping[str, torch.Tensor], generator: torch.Generator) -> TrainingExample:
        masked = self.scheme.training(columns["item_ids"], columns["lengths"], generator)
        events = hidden_events(columns, masked.replaced, masked.lengths)
        features = SequentialFeatures(masked.lengths, masked.input_ids, events)
        layout = masked_layout(masked)
        read = layout.flatten(masked.targets).nonzero()[:, 0]
        example = make_example(features, layout, masked.targets, None, columns["user_ids"], read)
        return replace(example, replaced=layout.flatten(masked.replaced))


def masked_layout(masked: MaskedSequence) -> Layout:
    """The jagged layout of a masked sequence, with its own visibility."""
    layout = jagged_layout(masked.lengths, masked.input_ids.shape[1])
    if masked.visibility is None:
        return layout
    return layout.with_visibility(Visibility(*(layout.flatten(x) for x in masked.visibility)))


def following(values: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, N, count]``: each place of ``values [B, N]`` and those behind it, 0 beyond a row's length."""
    width = values.shape[1]
    values = values * (torch.arange(width, device=values.device) < lengths[:, None])
    return F.pad(values, (0, count - 1)).unfold(1, count, 1)


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


def _move(value, device):
    """Tensors inside (nested) frozen dataclasses, dicts and tuples, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _move(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    return value
