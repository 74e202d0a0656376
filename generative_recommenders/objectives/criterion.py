"""Scores and loss of a step: one object per family, so that the trainer does not know which it runs."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.utils.checkpoint

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.losses.catalogue import CatalogueLoss
from generative_recommenders.objectives.losses.sampled import SampledLoss
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from generative_recommenders.objectives.negative_samplers import Negatives
from generative_recommenders.objectives.scoring import Scorer
from generative_recommenders.ops.normalization import l2_normalize

CriterionOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""Loss sum, its weight, weighted auxiliary losses (means over the step)."""


class Criterion(torch.nn.Module):
    """From the states at the read positions to a loss.

    auxiliary_weights: weight of each auxiliary loss by name; a name that the configuration does not produce
    is an error.
    """

    needs_negatives = True

    def __init__(self, auxiliary_weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.auxiliary_weights = dict(auxiliary_weights or {})

    @abstractmethod
    def forward(
        self,
        states: torch.Tensor,
        items: ItemRows,
        example: TrainingExample,
        negatives: Negatives | None,
        similarity: torch.nn.Module,
    ) -> CriterionOutput:
        """states ``[M, D]`` float32."""

    def weighted(self, auxiliary: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = sorted(set(self.auxiliary_weights) - set(auxiliary))
        if missing:
            known = ", ".join(sorted(auxiliary)) or "none"
            raise UserError(
                f"loss_weights name {', '.join(missing)}, which this configuration does not produce ({known})"
            )
        return {name: weight * auxiliary[name] for name, weight in self.auxiliary_weights.items()}


class SampledCriterion(Criterion):
    """A sampled loss over a scorer's score matrices. checkpoint: scores are computed again in the backward
    pass.
    """

    def __init__(
        self,
        loss: SampledLoss,
        scorer: Scorer,
        auxiliary_weights: dict[str, float] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(auxiliary_weights)
        self.loss = loss
        self.scorer = scorer
        self.checkpoint = checkpoint

    def forward(self, states, items, example, negatives, similarity):
        if not self.checkpoint:
            return self._loss(states, items.weight, items, example, negatives, similarity)
        return torch.utils.checkpoint.checkpoint(
            self._loss, states, items.weight, items, example, negatives, similarity, use_reentrant=False
        )

    def _loss(self, states, weight, items, example, negatives, similarity):
        rows = ItemRows(weight, items.ids, items.row_of_item)
        scores = self.scorer.scores(states, rows, example.targets, negatives, similarity, example.users)
        columns = scores.positive.shape
        extra = (
            [example.ratings.view(columns)] if self.loss.needs_ratings and example.ratings is not None else []
        )
        output = self.loss(
            scores.positive, scores.negative, example.weights.view(columns), scores.negative_mask, *extra
        )
        return output.sum, output.weight, self.weighted(scores.auxiliary)


class CatalogueCriterion(Criterion):
    """A loss over the whole catalogue by dot product: ``states · item / temperature``."""

    needs_negatives = False

    def __init__(
        self,
        loss: CatalogueLoss | ScalableCrossEntropyLoss,
        temperature: float,
        item_l2_norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.temperature = temperature
        self.item_l2_norm = item_l2_norm
        self.eps = eps

    def forward(self, states, items, example, negatives, similarity):
        weight = items.weight.float()
        if self.item_l2_norm:
            weight = l2_normalize(weight, self.eps)
        if items.row_of_item is None:
            weight = weight[1:]
        else:
            weight = weight[items.row_of_item[1:]]
        output = self.loss(states / self.temperature, weight, example.targets - 1, example.weights)
        return output.sum, output.weight, {}
