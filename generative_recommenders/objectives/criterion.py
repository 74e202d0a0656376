"""Criteria: from the states at the read positions to a loss, over sampled negatives or the whole catalogue."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.sharded_items import ShardRows
from generative_recommenders.modeling.similarity.interface import Similarity
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.losses.catalogue import CatalogueLoss
from generative_recommenders.objectives.losses.sampled import SampledLoss
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from generative_recommenders.objectives.negative_samplers import Negatives
from generative_recommenders.objectives.scoring import sampled_scores
from generative_recommenders.ops import numbered_rows
from generative_recommenders.ops.counter_random import CounterDraws, Key, stream_key
from generative_recommenders.ops.numbered_rows import NumberedRows
from generative_recommenders.ops.recomputation import recomputed
from generative_recommenders.types import LossOutput

MAX_POSITIONS = 1 << 20
"""More than a history has, so that row and position make one number."""
Sums = dict[str, torch.Tensor]
"""By name of an auxiliary loss: sums that are added up over processes before the loss is made of them."""


@dataclass(frozen=True)
class PreparedBatch:
    """An example and everything that is drawn and gathered for it.

    negatives: or None for losses over the catalogue. target_pool: ``[M]`` sorted unique targets of the global batch,
    where the criterion asks for them. scored_ids, row_ids: sorted unique items that are scored and table rows that are
    read; None for all. key: of the step's draws; first_row, first_target: numbers in the global batch of the example's
    first row and target. numbers_rows: whether dropout masks are drawn by the rows' numbers, so that N processes drop
    what one would.
    """

    example: TrainingExample
    negatives: Negatives | None
    target_pool: torch.Tensor | None
    scored_ids: torch.Tensor | None
    row_ids: torch.Tensor | None
    key: Key
    first_target: int
    first_row: int = 0
    numbers_rows: bool = False

    def token_rows(self, purpose: int) -> AbstractContextManager[None]:
        """Within it, dropout is drawn by the tokens' rows and positions in the global batch; see `numbers_rows`."""
        if not self.numbers_rows:
            return nullcontext()
        return numbered_rows.opened(NumberedRows(stream_key(self.key, purpose), self._token_numbers()))

    def target_rows(self, purpose: int, items: ItemRows) -> AbstractContextManager[None]:
        """The same for the positions that are read; for what is computed of each item, by the items' ids."""
        if not self.numbers_rows:
            return nullcontext()
        tokens, read = self._token_numbers(), self.example.read
        ids = torch.arange(len(items.weight), device=tokens.device) if items.ids is None else items.ids
        key = stream_key(self.key, purpose)
        return numbered_rows.opened(NumberedRows(key, tokens if read is None else tokens[read], ids))

    def _token_numbers(self) -> torch.Tensor:
        layout = self.example.layout
        return (layout.row_of + self.first_row) * MAX_POSITIONS + layout.positions

    def target_draws(self, purpose: int) -> CounterDraws:
        """Draws for every target, by its number."""
        targets = self.example.targets
        numbers = torch.arange(len(targets), device=targets.device) + self.first_target
        return CounterDraws(stream_key(self.key, purpose), numbers)


class Criterion(torch.nn.Module):
    """From the states at the read positions to a loss.

    auxiliary_weights: weight of each auxiliary loss by name, of those that the similarity makes.
    """

    needs_negatives = True
    needs_target_pool = False
    sums_over_tokens = True
    """False where a token's loss depends on other tokens, so that the number of processes changes it."""

    def __init__(self, auxiliary_weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.auxiliary_weights = dict(auxiliary_weights or {})

    @abstractmethod
    def forward(
        self,
        states: torch.Tensor,
        items: ItemRows,
        batch: PreparedBatch,
        similarity: Similarity,
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Loss sum, its weight, and the sums of auxiliary losses. states ``[M, D]`` float32; items: not yet
        normalised."""

    def auxiliary(self, sums: Sums, similarity: Similarity) -> dict[str, torch.Tensor]:
        """Weighted auxiliary losses of all processes' sums; outside training a similarity may make fewer."""
        losses = similarity.auxiliary_losses(sums)
        missing = self.auxiliary_weights.keys() - losses.keys()
        if missing and similarity.training:
            raise UserError(
                f"{type(similarity).__name__} made no auxiliary loss {', '.join(sorted(missing))} in training"
            )
        return {name: weight * losses[name] for name, weight in self.auxiliary_weights.items() if name in losses}


class SampledCriterion(Criterion):
    """A sampled loss. checkpoint: scores are computed again in the backward pass."""

    def __init__(
        self,
        loss: SampledLoss,
        auxiliary_weights: dict[str, float] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(auxiliary_weights)
        self.loss = loss
        self.checkpoint = checkpoint

    def forward(self, states, items, batch, similarity):
        arguments = states, items, batch, similarity
        return recomputed(self._loss, *arguments) if self.checkpoint else self._loss(*arguments)

    def _loss(self, states, items, batch, similarity):
        example, raw = batch.example, self.loss.raw_positives
        scores = sampled_scores(states, items, example.targets, batch.negatives, similarity, example.users, raw)
        columns = scores.positive.shape
        ratings = []
        if self.loss.needs_ratings and example.ratings is not None:
            ratings = [example.ratings.view(columns)]
        output: LossOutput = self.loss(
            scores.positive, scores.negative, example.weights.view(columns), scores.negative_mask, *ratings
        )
        return output.sum, output.weight, scores.sums


def product_operands(
    similarity: Similarity, states: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Similarity.operands`; UserError where scores are no products."""
    operands = similarity.operands(states, weight)
    if operands is None:
        raise UserError(
            f"scores of {type(similarity).__name__} are no products of states and items, which this loss or objective "
            "multiplies: choose a loss of sampled negatives, and no objective of replaced items"
        )
    return operands


class CatalogueCriterion(Criterion):
    """A loss over the whole catalogue, for similarities that are products."""

    needs_negatives = False

    def __init__(self, loss: CatalogueLoss | ScalableCrossEntropyLoss) -> None:
        super().__init__()
        self.loss = loss
        self.sums_over_tokens = not isinstance(loss, ScalableCrossEntropyLoss)

    def forward(self, states, items, batch, similarity):
        scored = items.normalized()
        query, weight = product_operands(similarity, states, scored.weight)
        catalogue = replace(scored, weight=weight).catalogue()
        arguments = query, catalogue, batch.example.targets - 1, batch.example.weights
        # A plug-in's loss need not know shards.
        shard = {"shard": scored.shard} if isinstance(scored, ShardRows) else {}
        output = self.loss(*arguments, **shard)
        return output.sum, output.weight, {}
