"""Optimizers: AdamW for all parameters (the published runs), or a row-wise one for the item table.

A step hands over the gradient of the item table as (rows, gradients of those rows); see `ItemTable`. Dense AdamW
updates the whole table, as the published programs do; ``lazy_adamw`` and ``rowwise_adagrad`` update the gathered rows
alone, so that the cost of a step does not grow with the catalogue.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch

from generative_recommenders.config.fields import Positive
from generative_recommenders.config.registry import register_optimizer
from generative_recommenders.distributed.torchrec_table import TorchRecTable
from generative_recommenders.errors import UserError
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.threads import in_threads

BETAS = (0.9, 0.98)
_CHUNK = 1 << 17
"""Numbers of a chunk of rows; an update keeps about six times as many at hand."""
DENSE = "adamw."
"""Before the names of the dense optimizer's state; the name that checkpoints have had since the first release."""


def changed_rows(grads: torch.Tensor) -> torch.Tensor:
    """``[n]`` rows of ``grads [U, D]`` that are not all 0; NaN differs from 0, too."""
    # In a fraction of the time of `any`.
    return ((grads.amax(1) != 0) | (grads.amin(1) != 0)).nonzero()[:, 0]


class TableOptimizer(ABC):
    """Optimizer of single rows of one table; rows whose gradient is 0 are left alone.

    On a CPU rows go in chunks that stay in the cache of a core, each from gradient to new weights at once. On an
    accelerator `update` gets all of them and must look at no number, so that it can be captured. State tensors are
    named, so that a checkpoint can hold them.
    """

    relative_rate = 1.0
    """The table's learning rate as a multiple of the run's, with which it warms up and decays."""

    def __init__(self, table: torch.nn.Parameter, learning_rate: float, weight_decay: float) -> None:
        self.table = table
        self.learning_rate: Any = learning_rate  # a scalar of the device where the update is captured
        self.weight_decay = weight_decay
        self.state: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, rows: torch.Tensor | None, grads: torch.Tensor) -> None:
        """Updates rows of the table.

        rows: ``[U]`` int64, None for all; the same row more than once has the same gradient each time. grads:
        ``[U, D]``.
        """
        if dispatch.waits(grads):
            self.update(slice(None) if rows is None else rows, grads, grads.any(1)[:, None])
            return

        def update_chunks(starts: range) -> None:
            for start in starts:
                chunk = slice(start, start + starts.step)
                some = grads[chunk]
                where: torch.Tensor | slice = chunk if rows is None else rows[chunk]
                changed = changed_rows(some)
                if len(changed) < len(some):
                    some = some[changed]
                    where = changed + start if rows is None else rows[chunk][changed]
                self.update(where, some)

        size = max(1, _CHUNK // grads.shape[1])
        middle = -(-len(grads) // size // torch.get_num_threads()) * size or size
        in_threads(
            update_chunks,
            [range(first, min(first + middle, len(grads)), size) for first in range(0, len(grads), middle)],
        )

    @abstractmethod
    def update(self, rows: torch.Tensor | slice, grads: torch.Tensor, changed: torch.Tensor | None = None) -> None:
        """`step` of some rows. changed: ``[U, 1]`` bool, which of them change; None for all."""


class LazyAdamW(TableOptimizer):
    """AdamW (arXiv 1711.05101) whose moments and decay change only for rows with a gradient; one step count for all
    rows."""

    def __init__(self, table: torch.nn.Parameter, learning_rate: float, weight_decay: float) -> None:
        super().__init__(table, learning_rate, weight_decay)
        self.state = {
            "exp_avg": torch.zeros_like(table.data),
            "exp_avg_sq": torch.zeros_like(table.data),
            "step": torch.zeros((), dtype=torch.int64, device=table.device),
        }

    @torch.no_grad()
    def step(self, rows: torch.Tensor | None, grads: torch.Tensor) -> None:
        beta1, beta2 = BETAS
        count = self.state["step"].add_(1).double()
        self.rate = (self.learning_rate / (1 - beta1**count)).to(grads.dtype)
        self.correction = (1 - beta2**count).to(grads.dtype)
        super().step(rows, grads)

    def update(self, rows: torch.Tensor | slice, grads: torch.Tensor, changed: torch.Tensor | None = None) -> None:
        beta1, beta2 = BETAS
        rate = self.rate
        share: Any = 1 - beta1
        kept: Any = beta2
        decay = 1 - self.learning_rate * self.weight_decay
        if changed is not None:
            rate, share = changed * rate, torch.where(changed, share, 0.0).to(grads.dtype)
            kept, decay = torch.where(changed, kept, 1.0), torch.where(changed, decay, 1.0)
        first = _taken(self.state["exp_avg"], rows).lerp_(grads, share)
        second = _taken(self.state["exp_avg_sq"], rows).mul_(kept).addcmul_(grads, grads, value=1 - beta2)
        scale = (second / self.correction).sqrt_().add_(1e-8)
        weights = _taken(self.table, rows).mul_(decay).sub_((rate * first).div_(scale))
        _put(self.state["exp_avg"], rows, first)
        _put(self.state["exp_avg_sq"], rows, second)
        _put(self.table, rows, weights)


class RowwiseAdagrad(TableOptimizer):
    """Adagrad with one accumulator a row, the mean squared gradient of the row (as in fbgemm's embedding tables)."""

    def __init__(self, table: torch.nn.Parameter, learning_rate: float, weight_decay: float) -> None:
        super().__init__(table, learning_rate, weight_decay)
        self.state = {"sum_of_squares": torch.zeros(table.shape[0], device=table.device)}

    def update(self, rows: torch.Tensor | slice, grads: torch.Tensor, changed: torch.Tensor | None = None) -> None:
        decay = 1 - self.learning_rate * self.weight_decay
        if changed is not None:
            decay = torch.where(changed, decay, 1.0)
        squares = torch.linalg.vector_norm(grads, dim=1).square_().div_(grads.shape[1])
        total = _taken(self.state["sum_of_squares"], rows).add_(squares)
        weights = _taken(self.table, rows)
        if self.weight_decay:
            weights.mul_(decay)
        rates = self.learning_rate / (total.sqrt() + 1e-10)
        weights.addcmul_(grads, rates[:, None], value=-1.0)
        _put(self.state["sum_of_squares"], rows, total)
        _put(self.table, rows, weights)


def _taken(table: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """A copy of the rows, or of a slice the part of the table itself."""
    return table.detach().index_select(0, rows) if isinstance(rows, torch.Tensor) else table.detach()[rows]


def _put(table: torch.Tensor, rows: torch.Tensor | slice, values: torch.Tensor) -> None:
    """Writes changed rows of `_taken` back."""
    if isinstance(rows, torch.Tensor):
        table.detach().index_copy_(0, rows, values)


@register_optimizer("adamw", gin_name="adamw")
class AdamW:
    """AdamW (0.9, 0.98) for all parameters, the item table among them, as in the published runs."""

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def dense(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """torch's optimizer of the dense parameters, and of the table where `rows` gives it none."""
        return torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=BETAS, weight_decay=self.weight_decay, fused=True,
            capturable=parameters[0].device.type == "cuda",
        )  # fmt: skip

    def rows(self, table: torch.nn.Parameter) -> TableOptimizer | None:
        """The optimizer of the table's gathered rows; None: the table is one of the dense parameters."""
        return None


@register_optimizer("lazy_adamw", gin_name="lazy_adamw")
class LazyRows(AdamW):
    """AdamW; the item table by `LazyAdamW`."""

    def rows(self, table: torch.nn.Parameter) -> TableOptimizer | None:
        return LazyAdamW(table, self.learning_rate, self.weight_decay)


@register_optimizer("rowwise_adagrad", gin_name="rowwise_adagrad")
class AdagradRows(AdamW):
    """AdamW; the item table by `RowwiseAdagrad`.

    item_learning_rate: of the item table; None for that of all other parameters. Adagrad's steps shrink with the square
    root of what a row has seen, and all of its numbers share one size, so that the rates which suit AdamW are far too
    small for it.
    """

    def __init__(self, learning_rate: float, weight_decay: float, item_learning_rate: Positive | None = None) -> None:
        super().__init__(learning_rate, weight_decay)
        self.item_learning_rate = item_learning_rate or learning_rate

    def rows(self, table: torch.nn.Parameter) -> TableOptimizer | None:
        optimizer = RowwiseAdagrad(table, self.item_learning_rate, self.weight_decay)
        optimizer.relative_rate = self.item_learning_rate / self.learning_rate
        return optimizer


class Optimizer:
    """A run's updates: the chosen rule for dense parameters and the item table, with linear warm-up and clipping.

    rule: the part by ``train_fn.optimizer``. max_grad_norm: total L2 norm over dense and table gradients, None for no
    clipping.
    cosine_steps: steps of the whole run, over which the learning rate falls to 0 along half a cosine; None leaves it.
    ``cosine_shift`` is added to the step there: a run that was resumed at another batch has done other steps than those
    that lead to its place.
    sum_over_shards: sums a number over processes, where each holds rows of the table of its own.
    kept: what keeps the table where TorchRec does, and updates its rows, where the lookup found them, by the
    `RowwiseAdagrad` of fbgemm, which sums their gradients over processes.
    """

    def __init__(
        self,
        dense: Iterable[torch.nn.Parameter],
        table: torch.nn.Parameter,
        rule: AdamW,
        num_warmup_steps: int = 0,
        max_grad_norm: float | None = None,
        cosine_steps: int | None = None,
        sum_over_shards: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kept: TorchRecTable | None = None,
    ) -> None:
        self.rule, self.table, self.sum_over_shards = rule, table, sum_over_shards
        self.sparse = rule.rows(table) if table.requires_grad else None
        self.kept = kept if self.sparse is not None else None
        if self.sparse is not None and kept is not None:
            # It tells the rate and the state alone: its `step` must not be called, or the rows move twice.
            self.sparse.state = {"sum_of_squares": kept.sum_of_squares}
        # A row-wise optimizer takes the table out of the dense one, whose moments would move every row at every step.
        self.parameters = [p for p in (*dense, *(() if self.sparse else (table,))) if p.requires_grad]
        self.dense = rule.dense(self.parameters) if self.parameters else None
        self.num_warmup_steps = num_warmup_steps
        self.max_grad_norm = max_grad_norm
        self.cosine_steps, self.cosine_shift = cosine_steps, 0

    def zero_grad(self) -> None:
        for parameter in (*self.parameters, self.table):
            parameter.grad = None

    def before_lookup(self, step: int) -> None:
        """Comes before the rows of a step are looked up. step: as of `step`."""
        if self.sparse is not None and self.kept is not None:  # fbgemm takes the rate with the lookup
            self.kept.set_learning_rate(self.rate(step) * self.sparse.relative_rate)

    @property
    def capturable(self) -> bool:
        """Whether `update` of all rows can be captured as a CUDA graph."""
        return self.dense is None or all(g.get("capturable", False) for g in self.dense.param_groups)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        share = min(1.0, (step + 1) / max(self.num_warmup_steps, 1))
        if self.cosine_steps is not None:
            done = min(1.0, (step + self.cosine_shift) / self.cosine_steps)
            share *= (1 + math.cos(math.pi * done)) / 2
        return self.rule.learning_rate * share

    def update(self, rate: float | torch.Tensor, rows: torch.Tensor | None, grads: torch.Tensor | None) -> None:
        """One update by a learning rate, which may be a scalar on the device. rows ``[U]`` (None: all) and grads
        ``[U, D]`` of the table, None for a frozen one.
        """
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / self.gradient_norm(grads).clamp(min=1e-6)).clamp(max=1.0)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            grads = None if grads is None else grads * scale
        if grads is not None:
            self._update_table(rate, rows, grads)
        if self.dense is not None:
            for group in self.dense.param_groups:
                group["lr"] = rate
            self.dense.step()

    def _update_table(self, rate: float | torch.Tensor, rows: torch.Tensor | None, grads: torch.Tensor) -> None:
        """The rows' own update, or their gradient in the dense one's."""
        if self.kept is not None:
            self.kept.update(grads)
            return
        if rows is not None and dispatch.waits(rows):
            # What fills up the end of `sorted_unique` has no gradient of its own, and writes what its row gets.
            grads = grads[torch.searchsorted(rows, rows)]
        if self.sparse is None:
            self.table.grad = grads if rows is None else torch.zeros_like(self.table).index_copy_(0, rows, grads)
        else:
            self.sparse.learning_rate = rate * self.sparse.relative_rate
            self.sparse.step(rows, grads)

    def gradient_norm(self, table_grads: torch.Tensor | None) -> torch.Tensor:
        """The L2 norm ``[]`` over dense and table gradients together, as if the table were an ordinary parameter.

        Before `update`, which clips. Of dense gradients alone where TorchRec keeps the table, and sums its gradients
        later.
        """
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        if table_grads is not None and self.kept is None:
            own = table_grads.norm()
            norms.append(own if self.sum_over_shards is None else self.sum_over_shards(own.square()).sqrt())
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All state by name, for `load_state_tensors`."""
        state = self.dense.state if self.dense is not None else {}
        return self._table_state() | {
            f"{DENSE}{index}.{name}": torch.as_tensor(value)
            for index, parameter in enumerate(self.parameters)
            for name, value in state.get(parameter, {}).items()
        }

    def _table_state(self) -> dict[str, torch.Tensor]:
        state = self.sparse.state if self.sparse is not None else {}
        return {f"table.{name}": value for name, value in state.items()}

    @property
    def table_prefix(self) -> str:
        """Prefix of the names in `state_tensors` of the table's state."""
        index = next((i for i, each in enumerate(self.parameters) if each is self.table), None)
        return "table." if self.sparse is not None else f"{DENSE}{index}."

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores `state_tensors`; UserError, before anything is changed, where they do not fit these parameters."""
        self._check_state(tensors)
        for index, parameter in enumerate(self.parameters):
            prefix = f"{DENSE}{index}."
            state = {
                name.removeprefix(prefix): value.to(parameter.device).clone()
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            if state and self.dense is not None:
                self.dense.state[parameter] = state
        for name, value in self._table_state().items():
            value.copy_(tensors[name])

    def _check_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """UserError for names, shapes or dtypes that do not fit. A parameter that never had a gradient has no state."""
        found, wanted = (
            {name: (x.shape, x.dtype) for name, x in each.items()} for each in (tensors, self._table_state())
        )
        for dims in {parameter.dim() for parameter in self.parameters}:
            probe = torch.nn.Parameter(torch.zeros(tuple(range(2, 2 + dims))))
            probe.grad = torch.zeros_like(probe)
            optimizer = self.rule.dense([probe])
            optimizer.step()  # torch's optimizers make their state in the first step
            made = {name: torch.as_tensor(value) for name, value in optimizer.state[probe].items()}
            for index, parameter in enumerate(self.parameters):
                own = f"{DENSE}{index}."
                if parameter.dim() != probe.dim() or not any(name.startswith(own) for name in tensors):
                    continue
                for name, x in made.items():
                    shape = x.shape  # of a number, as the step
                    if x.dim() and x.shape == probe.shape:
                        shape = parameter.shape
                    elif x.dim() and own + name in found:  # the optimizer alone knows
                        shape = found[own + name][0]
                    wanted[own + name] = shape, x.dtype
        if found != wanted:
            odd = min(name for name in wanted | found if found.get(name) != wanted.get(name))
            shown = f"{found[odd][0]} of {found[odd][1]}" if odd in found else "missing"
            raise UserError(f"the optimizer's state does not fit the configuration: {odd} is {shown}")
