"""One training step: touched rows, scores, loss, gradients, update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from absl import logging
from torch.nn.parallel import DistributedDataParallel

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.modeling.events import token_events
from generative_recommenders.modeling.items import ItemEmbedding, ItemRows
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.objectives.criterion import Criterion
from generative_recommenders.objectives.examples import TrainingExample
from generative_recommenders.objectives.negative_samplers import BatchItems, Negatives, NegativesSampler
from generative_recommenders.ops.counter_random import stream_key
from generative_recommenders.training.optimizers import Optimizer

DENSE_SHARE = 4
"""A step that touches more than 1 / DENSE_SHARE of the table works on all of it: no search for unique rows."""


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global batch; targets: how many it is over; both from all processes.
    learning_rate: 0.0 where nothing was updated."""

    loss: torch.Tensor
    targets: torch.Tensor
    learning_rate: float


@dataclass(frozen=True)
class StepForward:
    """leaf ``[U, D]``: rows leaf_ids (None: all) of the item table, which the backward pass differentiates."""

    leaf: torch.Tensor
    leaf_ids: torch.Tensor | None
    loss_sum: torch.Tensor
    weight: torch.Tensor
    auxiliary: dict[str, torch.Tensor]


class DensePart(torch.nn.Module):
    """What data-parallel training synchronises: everything but the item table, whose touched rows are an input."""

    def __init__(
        self, model: SequenceRecommender, criterion: Criterion, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.sequence = model.sequence
        self.similarity = model.similarity
        self.tower = model.items.tower
        self.mask_embedding = model.mask_embedding
        self.criterion = criterion
        self.autocast = autocast
        self._items: tuple[ItemEmbedding] = (
            model.items,
        )  # in a tuple: its table is not a parameter of this part

    def forward(
        self,
        leaf: torch.Tensor,
        leaf_ids: torch.Tensor | None,
        scored_ids: torch.Tensor | None,
        example: TrainingExample,
        negatives: Negatives | None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Loss sum, its weight, and auxiliary losses (means)."""
        (items,) = self._items
        table = ItemRows(leaf, leaf_ids)
        embeddings = items.history_rows(table).lookup(example.past_ids)
        if example.replaced is not None and self.mask_embedding is not None:
            embeddings = self.mask_embedding(embeddings, example.replaced)
        with self._autocast(leaf.device):
            states = self.sequence(embeddings, example.layout, model_events(example))
        if example.read is not None:
            states = states.index_select(0, example.read)
        scored = items.scored_rows(table, scored_ids)
        return self.criterion(states.float(), scored, example, negatives, self.similarity)

    def _autocast(self, device: torch.device):
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


def model_events(example: TrainingExample) -> dict[str, torch.Tensor]:
    """Per-token events of the example's histories."""
    return token_events(example.features.past_events, example.features.past_lengths, example.layout)


class TrainingStep:
    """Runs steps of a model; the same for one process and for many."""

    def __init__(
        self,
        model: SequenceRecommender,
        criterion: Criterion,
        sampler: NegativesSampler | None,
        optimizer: Optimizer,
        collectives: Collectives,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.sampler, self.optimizer = model, sampler, optimizer
        self.collectives, self.seed = collectives, seed
        self.said_empty = False
        self.dense = DensePart(model, criterion, autocast)
        self._runner: torch.nn.Module | None = self.dense if collectives.world_size == 1 else None

    def __call__(self, example: TrainingExample, first_target: int, step: int) -> StepResult:
        """example on the model's device; first_target: its number in the global batch; step: since the run began.

        A loss that is not finite updates nothing on a CPU, so that its origin can still be found. Nor does a step in
        which no target of any process counts: momentum and weight decay rest too, and the step has its number all the same.
        """
        self.optimizer.zero_grad()
        forward = self.forward(example, first_target, step)
        total = self.collectives.sum_(forward.weight.detach().clone())
        read_total = read_later(total)
        # DDP averages gradients over processes; table gradients are summed below, so both start from a sum.
        world = self.collectives.world_size
        loss = forward.loss_sum / total.clamp(min=1e-12) + sum(forward.auxiliary.values()) / world
        (loss * world).backward()
        rows, grads = self._table_gradients(forward.leaf, forward.leaf_ids)
        mean = self.collectives.sum_(loss.detach().clone())
        if mean.device.type == "cpu" and not mean.isfinite():  # an accelerator would have to be waited for
            return StepResult(mean, total, 0.0)
        if read_total() == 0:
            self._say_empty(step)
            return StepResult(mean, total, 0.0)
        return StepResult(mean, total, self.optimizer.step(step, rows, grads))

    def _say_empty(self, step: int) -> None:
        """Once."""
        if not self.said_empty:
            logging.warning(
                "no target of step %d counts: it updates nothing, nor will others like it", step + 1
            )
        self.said_empty = True

    def forward(self, example: TrainingExample, first_target: int, step: int) -> StepForward:
        """The step's loss, up to the backward pass."""
        negatives = self._negatives(example, first_target, step)
        scored_ids, leaf_ids = self._touched(example, negatives)
        table = self.model.items.table
        leaf = (table if leaf_ids is None else table[leaf_ids]).detach().requires_grad_()
        inputs = (leaf, leaf_ids, scored_ids, example, negatives)
        if self._runner is None:
            unused = self.collectives.any(self._leaves_unused(inputs))
            self._runner = DistributedDataParallel(self.dense, find_unused_parameters=unused)
        loss_sum, weight, auxiliary = self._runner(*inputs)
        return StepForward(leaf, leaf_ids, loss_sum, weight, auxiliary)

    def _leaves_unused(self, inputs: tuple) -> bool:
        """Whether parameters get no gradient, like HSTU's bias by time where the data have no times. DDP has to
        search for them in every step, and warns where it finds none."""
        device = inputs[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss_sum, _, auxiliary = self.dense(*inputs)
        wanted = [parameter for parameter in self.dense.parameters() if parameter.requires_grad]
        loss = loss_sum + sum(auxiliary.values())
        return any(each is None for each in torch.autograd.grad(loss, wanted, allow_unused=True))

    def _negatives(self, example: TrainingExample, first_target: int, step: int) -> Negatives | None:
        if self.sampler is None:
            return None
        pool, targets = None, example.targets
        if self.sampler.uses_batch_pool:
            local = torch.unique(torch.cat([example.past_ids, targets.flatten()]))
            pool = torch.unique(self.collectives.gather_variable(local))
            pool = pool[pool > 0]
        key = stream_key(self.seed, step)
        batch = BatchItems(pool, targets if targets.dim() == 1 else targets[:, 0])
        return self.sampler(key, first_target, len(targets), batch)

    def _touched(
        self, example: TrainingExample, negatives: Negatives | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sorted unique item ids that are scored, and table rows that are read; None for all."""
        items = self.model.items
        if negatives is None:
            return None, None
        touched = negatives.ids.numel() + example.targets.numel() + example.past_ids.numel()
        if touched * DENSE_SHARE > items.table.shape[0] and items.tower is None:
            return None, None
        scored = torch.unique(torch.cat([example.targets.flatten(), negatives.ids.flatten()]))
        every = torch.unique(torch.cat([scored, example.past_ids]))
        return scored, items.table_rows(every)

    def _table_gradients(
        self, leaf: torch.Tensor, leaf_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Summed over processes: rows (None for all) and their gradients."""
        world = self.collectives.world_size
        assert leaf.grad is not None  # the backward pass has run
        grad = leaf.grad / world if world > 1 else leaf.grad
        if world == 1:
            return leaf_ids, grad
        everywhere_dense = not self.collectives.any(leaf_ids is not None)
        if everywhere_dense:
            return None, self.collectives.sum_(grad)
        ids = torch.arange(leaf.shape[0], device=leaf.device) if leaf_ids is None else leaf_ids
        all_ids, place = torch.unique(self.collectives.gather_variable(ids), return_inverse=True)
        gathered = self.collectives.gather_variable(grad)
        return all_ids, gathered.new_zeros(all_ids.numel(), grad.shape[1]).index_add_(0, place, gathered)


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """A scalar that is asked for now and waited for when called: what an accelerator was given since then goes on."""
    if value.device.type != "cuda":
        return lambda: float(value)
    copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(copy)

    return read
