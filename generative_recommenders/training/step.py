"""One training step: gathered rows, loss, gradients over processes, update."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from absl import logging
from torch.nn.parallel import DistributedDataParallel

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.sharded_items import ShardedItemEmbedding
from generative_recommenders.objectives.criterion import PreparedBatch
from generative_recommenders.objectives.task import TrainingTask
from generative_recommenders.training.optimizers import Optimizer
from generative_recommenders.types import LossOutput


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global batch; targets: how many it is over; both from all processes.
    learning_rate: 0.0 where nothing was updated. gradient_norm: see `TrainingStep.measures_norm`."""

    loss: torch.Tensor
    targets: torch.Tensor
    learning_rate: float
    gradient_norm: torch.Tensor | None = None


class TrainingStep:
    """Runs steps of a task; the same for one process and for many.

    measures_norm: whether the next steps give the L2 norm of their gradients, before clipping. It reads all of them
    once more, so the trainer asks in the steps that it records.
    """

    measures_norm = False

    def __init__(self, task: TrainingTask, optimizer: Optimizer, collectives: Collectives) -> None:
        self.task, self.optimizer, self.collectives = task, optimizer, collectives
        self._warned_empty = False
        self._runner: torch.nn.Module | None = task if collectives.world_size == 1 else None

    def __call__(self, batch: LoadedBatch, step: int) -> StepResult:
        """One step on this process's part of a batch. step: since the run began."""
        return self.update(self.task.prepare(batch, step), step)

    def update(self, batch: PreparedBatch, step: int) -> StepResult:
        """Forward, backward, sums over processes, update.

        A loss that is not finite updates nothing on a CPU, so that its origin can still be found. Nor does a step in
        which no target of any process counts: momentum and weight decay rest too, and the step has its number all the
        same.
        """
        self.optimizer.zero_grad()
        self.optimizer.before_lookup(step)
        rows, output = self.forward(batch)
        total = self.collectives.sum_(output.weight.detach().clone())
        read_total = read_later(total)
        loss = output.sum / total.clamp(min=1e-12)  # 0, and not 0 / 0, where no target counts
        auxiliary = torch.zeros_like(loss) + sum(output.auxiliary.values())  # of all processes already
        # DDP averages gradients over processes; table gradients are summed below, so both start from a sum.
        ((loss + auxiliary) * self.collectives.world_size).backward()
        row_ids, gradients = self._table_gradients(rows)
        mean = self.collectives.sum_(loss.detach().clone()) + auxiliary.detach()
        if mean.device.type == "cpu" and not mean.isfinite():  # an accelerator would have to be waited for
            return StepResult(mean, total, 0.0)
        if read_total() == 0:
            if not self._warned_empty:
                logging.warning("step %d has no target with weight: update skipped; only this one is logged", step + 1)
            self._warned_empty = True
            return StepResult(mean, total, 0.0)
        norm = self.optimizer.gradient_norm(gradients) if self.measures_norm else None
        rate = self.optimizer.rate(step)
        self.optimizer.update(rate, row_ids, gradients)
        return StepResult(mean, total, rate, norm)

    def forward(self, batch: PreparedBatch) -> tuple[ItemRows, LossOutput]:
        """The gathered rows of the item table, which the backward pass differentiates, and the loss."""
        rows = self.task.model.items.step_rows(batch.row_ids)
        if self._runner is None:
            self._runner = self._data_parallel(batch, rows)
        return rows, self._runner(batch, rows)

    def _data_parallel(self, batch: PreparedBatch, rows: ItemRows) -> torch.nn.Module:
        """The task with synchronised gradients of all parameters but the item table, which has `_table_gradients`.

        Where parameters get no gradient, like HSTU's bias by time where the data have no times, DDP has to search for
        them in every step, and warns where it finds none.
        """
        device = rows.weight.device
        # A pass that nothing is updated by finds out, and draws nothing that the step itself would miss.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            output = self.task(batch, rows)
        named = dict(self.task.named_parameters())
        wanted = [p for name, p in named.items() if name != TABLE and p.requires_grad]
        if not wanted:  # the rest is frozen
            return self.task
        loss = output.sum + sum(output.auxiliary.values())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        unused = self.collectives.any(any(each is None for each in gradients))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.task, [TABLE])
        with warnings.catch_warnings():
            # torch 2.6 knows no other name, and what 2.13 proposes instead sends the buffers out, which are equal
            # already.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(self.task, find_unused_parameters=unused, broadcast_buffers=False)

    def _table_gradients(self, rows: ItemRows) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Summed over processes: row ids (None for all) and their gradients (None for a frozen table); of a sharded
        table those of this process."""
        world, leaf, items = self.collectives.world_size, rows.weight, self.task.model.items
        if isinstance(items, ShardedItemEmbedding):
            return items.gradients(rows, world)
        if not leaf.requires_grad:
            return None, None
        gradients = rows.gradient()
        assert gradients is not None  # the backward pass has run
        if world == 1:
            return rows.ids, gradients
        gradients = gradients / world  # `update` multiplied by it, for the mean that DDP takes of the others
        everywhere_dense = not self.collectives.any(rows.ids is not None)
        if everywhere_dense:
            return None, self.collectives.sum_(gradients)
        ids = torch.arange(leaf.shape[0], device=leaf.device) if rows.ids is None else rows.ids
        all_ids, place = torch.unique(self.collectives.gather_variable(ids), return_inverse=True)
        gathered = self.collectives.gather_variable(gradients)
        return all_ids, gathered.new_zeros(all_ids.numel(), leaf.shape[1]).index_add_(0, place, gathered)


TABLE = "model.items.table"
"""The task's name of the item table."""


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """Asynchronous copy of a scalar to the host; calling the result waits for it, and for no work queued later."""
    if value.device.type != "cuda":
        return lambda: float(value)
    copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(copy)

    return read
