"""Training steps captured as CUDA graphs: a step is then one launch, whatever the number of its kernels.

A graph holds for one number of tokens. Batches are filled up to one of few numbers by rows whose targets count for
nothing, so that nothing else changes; the step of a number that was not seen before runs kernel by kernel, the second
one is captured, and all later ones replay it. What differs from step to step (columns, the key of the draws, the
learning rate) lies in one buffer, which one copy fills.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from absl import logging

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import first_line
from generative_recommenders.objectives.task import TrainingTask
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.counter_random import stream_key
from generative_recommenders.training.optimizers import Optimizer
from generative_recommenders.training.step import StepResult, TrainingStep

GRANULES = 32
"""Numbers of tokens that are told apart, of those that a batch can have."""
_ALIGNMENT = 16
"""Of columns in the buffer, in bytes."""


def can_capture(task: TrainingTask, optimizer: Optimizer, collectives: Collectives) -> bool:
    """Whether steps may be captured: on one GPU, with shapes that follow from the number of tokens alone."""
    on_gpu = dispatch.takes_kernels(task.model.items.table) and collectives.world_size == 1
    return on_gpu and task.fixed_shapes and optimizer.capturable


class CapturedStep(TrainingStep):
    """`TrainingStep` by CUDA graphs. rows: B, the most rows of a batch."""

    def __init__(self, task: TrainingTask, optimizer: Optimizer, collectives: Collectives, rows: int) -> None:
        super().__init__(task, optimizer, collectives)
        self.rows = rows
        self.inputs: StepInputs | None = None
        self._graphs: dict[int, _Graph | None] = {}
        self._captures = True

    def __call__(self, batch: LoadedBatch, step: int) -> StepResult:
        if not self._captures or batch.global_tokens == 0:
            return super().__call__(batch, step)
        tokens, norm = self.fill(batch, step), None
        if tokens not in self._graphs or self.measures_norm:  # graphs measure no norm: replays stay short
            loss, targets, norm = self.padded_step(tokens)
            self._graphs.setdefault(tokens, None)
        else:
            captured = self._graphs[tokens] or self._capture(tokens)
            if captured is None:
                return super().__call__(batch, step)
            captured.graph.replay()
            loss, targets = captured.loss.clone(), captured.targets.clone()  # the next replay overwrites them
        return StepResult(loss, targets, self.optimizer.rate(step), norm)

    def fill(self, batch: LoadedBatch, step: int) -> int:
        """Puts a batch into the inputs; returns the number of tokens with those that fill it up."""
        device = self.task.model.items.table.device
        if self.inputs is None:
            self.inputs = StepInputs(batch.columns, self.rows, device)
        return self.inputs.fill(batch, stream_key(self.task.seed, step), self.optimizer.rate(step))

    def padded_step(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Forward, backward and update on the inputs, without a look at any number: the loss, the number of targets,
        and the norm of the gradients where it is measured."""
        assert self.inputs is not None
        self.optimizer.zero_grad()
        batch = self.task.prepare_on_device(self.inputs.columns, self.inputs.key, tokens)
        rows, output = self.forward(batch)
        targets = output.weight.detach()
        loss = output.sum / targets.clamp(min=1e-12)
        loss.backward()
        norm = self.optimizer.gradient_norm(rows.weight.grad) if self.measures_norm else None
        self.optimizer.update(self.inputs.rate, rows.ids, rows.weight.grad)
        return loss.detach(), targets, norm

    def _capture(self, tokens: int) -> _Graph | None:
        """The graph of steps of so many tokens; None, and no other is tried, where an operation cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        # One pool of memory for all graphs, since one replays at a time.
        pool = next((each.graph.pool() for each in self._graphs.values() if each), None)
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss, targets, _ = self.padded_step(tokens)
        except RuntimeError as error:
            logging.warning("steps are not captured as CUDA graphs, which makes them slower: %s", first_line(error))
            self._captures = False
            self._graphs.clear()
            # A capture that fails leaves the random generator waiting for its end; a copy of its state does not.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            return None
        self._graphs[tokens] = _Graph(graph, loss, targets)
        return self._graphs[tokens]


class _Graph(NamedTuple):
    """A captured step on what the inputs hold at its replay, and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    loss: torch.Tensor
    targets: torch.Tensor


class StepInputs:
    """Columns of a batch, filled up, with the key of its draws and the learning rate, in one buffer of the device.

    columns: of a `LoadedBatch`, for their names, widths and dtypes. rows: the most that a batch has.
    """

    def __init__(self, columns: dict[str, torch.Tensor], rows: int, device: torch.device) -> None:
        self.length = columns["item_ids"].shape[1] - 1
        self.granule = max(1, rows * self.length // GRANULES)
        self.spare_rows = -(-self.granule // self.length)
        shapes = {name: ((rows + self.spare_rows, *x.shape[1:]), x.dtype) for name, x in columns.items()}
        shapes |= {_KEY: ((), torch.int64), _RATE: ((), torch.float32)}
        ends, size = {}, 0
        for name, (shape, dtype) in shapes.items():
            start = -(-size // _ALIGNMENT) * _ALIGNMENT
            size = start + math.prod(shape) * dtype.itemsize
            ends[name] = slice(start, size)

        def views(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: buffer[ends[name]].view(dtype).view(shape) for name, (shape, dtype) in shapes.items()}

        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self.columns = views(self.buffer)
        self.key, self.rate = self.columns.pop(_KEY), self.columns.pop(_RATE)
        # two on the host: one may still be on its way
        pinned = dispatch.waits(self.buffer)
        self.staged = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.views = [views(each) for each in self.staged]
        self.sent: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def fill(self, batch: LoadedBatch, key: int, rate: float) -> int:
        """Asks for the copy of a batch to the device; returns its number of tokens, a multiple of ``granule``."""
        self.turn = 1 - self.turn
        sent, host = self.sent[self.turn], self.views[self.turn]
        if sent is not None:
            sent.synchronize()
        rows = len(batch.columns["lengths"])
        for name, values in batch.columns.items():
            host[name][:rows] = values
            host[name][rows:] = 0
        missing = -batch.global_tokens % self.granule
        spare = (missing - self.length * torch.arange(self.spare_rows)).clamp(0, self.length)
        host["lengths"][rows : rows + self.spare_rows] = spare + 1  # the first event is no target
        host[_KEY].fill_(key)
        host[_RATE].fill_(rate)
        self.buffer.copy_(self.staged[self.turn], non_blocking=True)
        if dispatch.waits(self.buffer):
            self.sent[self.turn] = sent = torch.cuda.Event()
            sent.record()
        return batch.global_tokens + missing


_KEY, _RATE = " key", " rate"
"""Beside the columns; no column has such a name."""
