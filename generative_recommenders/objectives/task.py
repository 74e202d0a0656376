"""A training task: the loss of a batch, for this program's trainer and for any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from absl import logging

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.objectives.criterion import Criterion, PreparedBatch
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.negative_samplers import BatchItems, Negatives, NegativesSampler
from generative_recommenders.objectives.objective import Objective
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.counter_random import CounterDraws, Key, stream_key
from generative_recommenders.ops.embedding import gathering_pays, sorted_unique
from generative_recommenders.types import LossOutput

_MASKS, _ENCODER, _SCORING = 1 << 32, 1 << 33, 1 << 34
"""Purposes of draws: of masked positions, of dropout masks in the encoder, and of those where items are scored."""


class TrainingTask(torch.nn.Module):
    """Training task of a model: inputs and targets by an objective, negatives by a sampler, a loss by a criterion.

    sampler: None for losses over the catalogue. seed: of masks and negatives; both are drawn by (seed, step, place in
    the global batch), so that the number of processes changes no draw. collectives: the processes that share a batch.
    numbers_rows: see `PreparedBatch`.
    """

    def __init__(
        self,
        model: SequenceRecommender,
        objective: Objective,
        criterion: Criterion,
        sampler: NegativesSampler | None,
        seed: int,
        collectives: Collectives | None = None,
        numbers_rows: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.criterion, self.sampler = model, objective, criterion, sampler
        self.seed, self.numbers_rows = seed, numbers_rows
        self.updates_rows = False
        """Set by a trainer whose optimizer updates single rows of the item table."""
        self.collectives = collectives or Collectives(model.items.table.device)
        if self.collectives.world_size > 1 and self.collectives.is_main and not criterion.sums_over_tokens:
            logging.warning(
                "SCE draws its buckets from each process's tokens: its numbers depend on the number of processes"
            )

    def loss(self, batch: LoadedBatch, step: int, rows: ItemRows | None = None) -> LossOutput:
        """The loss of a loaded batch. step: since training began. rows: gathered rows of the item table, the leaf that
        is differentiated instead of the table; without them the table gets a dense gradient.
        """
        return self(self.prepare(batch, step), rows)

    def prepare(self, batch: LoadedBatch, step: int) -> PreparedBatch:
        """The batch's example, on the model's device, with its draws. Every process makes the same calls."""
        numbers = torch.arange(len(batch.columns["lengths"])) + batch.first_row
        draws = CounterDraws(stream_key(self.seed, step, _MASKS), numbers)
        example = self.objective.example(batch.columns, draws)
        first = self.objective.first_target(batch)
        if first is None:  # as many as the processes before have
            counts = self.collectives.gather_variable(torch.tensor([len(example.targets)]))
            first = int(counts[: self.collectives.rank].sum())
        key = stream_key(self.seed, step)
        return self.draw(example.to(self.model.items.table.device), first, key, batch.first_row)

    @property
    def fixed_shapes(self) -> bool:
        """Whether all shapes of a step follow from the number of its tokens, but for those of rows that it reads, and
        tokens whose targets do not count change no number; see `prepare_on_device`."""
        drawn_from_batch = self.sampler is not None and self.sampler.uses_batch_pool
        from_batch = self.criterion.needs_target_pool or drawn_from_batch
        counts_all = bool(self.criterion.auxiliary_weights)  # sums over all tokens
        return self.objective.fixed_shapes and not (from_batch or counts_all or self.numbers_rows)

    def prepare_on_device(
        self, columns: Mapping[str, torch.Tensor], key: torch.Tensor, num_tokens: int
    ) -> PreparedBatch:
        """`prepare` of columns on the model's device, without synchronising with it; for a single process.

        key: int64 scalar, ``stream_key(seed, step)``. num_tokens: T.
        """
        return self.draw(self.objective.device_example(columns, num_tokens), 0, key)

    def draw(self, example: TrainingExample, first_target: int, key: Key, first_row: int = 0) -> PreparedBatch:
        """Negatives of an example whose first target has this number, and the items and rows it reads."""
        targets, pool = example.targets, None
        if self.criterion.needs_target_pool:
            pool = torch.unique(self.collectives.gather_variable(torch.unique(targets)))
        negatives = None
        if self.sampler is not None:
            drawn_from = None
            if self.sampler.uses_batch_pool:
                # The published pool: every item of the batch's histories, targets included.
                local = torch.unique(torch.cat([example.past_ids, targets.flatten()]))
                everywhere = torch.unique(self.collectives.gather_variable(local))
                drawn_from = everywhere[everywhere > 0]
            items = BatchItems(drawn_from, targets if targets.dim() == 1 else targets[:, 0])
            negatives = self.sampler(key, first_target, len(targets), items)
        scored, rows = self.rows_read(example, negatives, pool)
        return PreparedBatch(example, negatives, pool, scored, rows, key, first_target, first_row, self.numbers_rows)

    def rows_read(
        self, example: TrainingExample, negatives: Negatives | None, pool: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Item ids that are scored and table rows that are read, as of `sorted_unique`; None for all."""
        items, ids = self.model.items, [] if pool is None else [pool]
        if negatives is not None:
            ids += [example.targets.flatten(), negatives.ids.flatten()]
        if items.shard is not None:
            return None, sorted_unique(torch.cat([*ids, example.past_ids]), items.num_items)
        if negatives is None:
            return None, None
        read = negatives.ids.numel() + example.targets.numel() + example.past_ids.numel()
        if not gathering_pays(read, items.table, self.updates_rows, items.tower is not None):
            return None, None
        if items.tower is None:  # scored are rows of the table: no need to tell them from those of histories
            scored = sorted_unique(torch.cat([*ids, example.past_ids]), items.num_items)
            return scored, items.table_rows(scored)
        scored = sorted_unique(torch.cat(ids), items.num_items)
        return scored, items.table_rows(sorted_unique(torch.cat([scored, example.past_ids]), items.num_items))

    def forward(self, batch: PreparedBatch, rows: ItemRows | None = None) -> LossOutput:
        """The differentiable part of `loss`."""
        items, similarity = self.model.items, self.model.similarity
        rows = items.all_rows() if rows is None else rows
        with dispatch.autocast(items.table.device, None), batch.token_rows(_ENCODER):
            states = self.model.states(batch.example, rows)
        scored = rows if self.criterion.needs_negatives else items.catalogue_rows(rows)
        scored = items.unnormalized_rows(scored, batch.scored_ids)
        with batch.target_rows(_SCORING, scored):
            total, weight, sums = self.criterion(states.float(), scored, batch, similarity)
        if self.collectives.world_size > 1:
            # In this order the number is the sum itself, the same on all processes; x - x is 0 and brings the gradient.
            sums = {k: self.collectives.sum_(x.detach().clone()) + (x - x.detach()) for k, x in sums.items()}
        return LossOutput(total, weight, self.criterion.auxiliary(sums, similarity))
