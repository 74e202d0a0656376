"""Progress of a run: remaining time, plateaus, divergence, and the module in which a NaN began."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, TypeVar

import torch
from tqdm import tqdm

from generative_recommenders.errors import UserError

T = TypeVar("T")


def with_progress(
    items: Iterable[T],
    total: int,
    description: str,
    done: int = 0,
    enabled: bool = True,
    stream: IO[str] | None = None,
    line_seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yields ``items`` and shows on ``stream`` (standard error) how many of ``total`` are done and how
    long the rest takes.

    A bar on a terminal, else a line at most every line_seconds. done: how many were done before (a resumed
    epoch); they do not count as speed. enabled: False on all processes but the main one.
    """
    stream = sys.stderr if stream is None else stream
    if not enabled:
        yield from items
    elif stream.isatty():
        yield from tqdm(items, description, total, initial=done, file=stream, dynamic_ncols=True, leave=False)
    else:
        yield from _with_lines(items, total, description, done, stream, line_seconds, clock)


def _with_lines(
    items: Iterable[T],
    total: int,
    description: str,
    done: int,
    stream: IO[str],
    line_seconds: float,
    clock: Callable[[], float],
) -> Iterator[T]:
    started = said = clock()
    for count, item in enumerate(items, start=1):
        yield item
        now = clock()
        if now - said >= line_seconds:
            said = now
            rate = count / (now - started)
            left = duration(max(total - done - count, 0) / rate)
            stream.write(f"{description}: {done + count}/{total}, {rate:.3g} a second, {left} left\n")
            stream.flush()


class RemainingTime:
    """How long the rest of a run takes, at the speed since this was made: evaluations and checkpoints included.

    total, done: steps of the whole run, and those that were done before.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done_before, self.clock = total, done, clock
        self.started = clock()

    def left(self, done: int) -> float:
        """Seconds; done: all steps done now, one at least since this was made."""
        seconds_a_step = (self.clock() - self.started) / max(done - self.done_before, 1)
        return max(self.total - done, 0) * seconds_a_step


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlateauMonitor:
    """A warning when a loss has not fallen by ``min_change`` of its best value ``patience`` times in a
    row; once a plateau."""

    def __init__(self, patience: int = 10, min_change: float = 1e-3) -> None:
        self.patience = patience
        self.min_change = min_change
        self.best: float | None = None
        self.without_gain = 0

    def observe(self, loss: float) -> str | None:
        """The warning, or None."""
        if self.best is None or self.best - loss > self.min_change * abs(self.best):
            self.best, self.without_gain = loss, 0
            return None
        self.without_gain += 1
        if self.without_gain != self.patience:
            return None
        return f"the loss has not fallen below {self.best:.5g} for {self.patience} observations: a plateau"


class DivergenceMonitor:
    """A warning when the smoothed loss has risen to ``factor`` times its lowest value; once until it has
    come down again.

    smoothing: weight of the past in the moving average, so that one hard batch is not taken for divergence.
    """

    def __init__(self, factor: float = 2.0, smoothing: float = 0.95) -> None:
        self.factor = factor
        self.smoothing = smoothing
        self.average: float | None = None
        self.lowest: float | None = None
        self.warned = False

    def observe(self, loss: float) -> str | None:
        """The warning, or None."""
        past = loss if self.average is None else self.average
        self.average = self.smoothing * past + (1 - self.smoothing) * loss
        self.lowest = self.average if self.lowest is None else min(self.lowest, self.average)
        above = self.average - self.lowest > (self.factor - 1) * abs(self.lowest)
        news, self.warned = above and not self.warned, above
        if not news:
            return None
        return (
            f"the loss is up to {self.average:.5g} from {self.lowest:.5g}: it diverges; "
            "a lower learning_rate, a longer warm-up or clipping (max_grad_norm) may help"
        )


class NonFiniteError(UserError):
    """A loss that is not a finite number; one line with the step and where it began."""

    exit_code = 3


def check_finite(loss: float, step: int, model: torch.nn.Module, rerun: Callable[[], object]) -> None:
    """Raises NonFiniteError for a NaN or infinite loss. rerun: computes the step's forward pass again."""
    if math.isfinite(loss):
        return
    parameter = _non_finite_parameter(model)
    if parameter is not None:
        origin = f"the parameter {parameter} is not finite: the update before was too large"
    else:
        module = first_non_finite_module(model, rerun)
        origin = (
            f"the first output that is not finite is that of {module}"
            if module
            else "the outputs of all modules are finite here, so it began in the loss or on another process"
        )
    raise NonFiniteError(
        f"the loss is {loss} at step {step}: {origin}; check the data for NaN, or lower learning_rate"
    )


def check_finite_parameters(step: int, model: torch.nn.Module) -> None:
    """Raises NonFiniteError for weights that hold NaN or an infinity, before they are scored or saved."""
    parameter = _non_finite_parameter(model)
    if parameter is not None:
        raise NonFiniteError(
            f"the parameter {parameter} is not finite after step {step}: the update was too large; lower learning_rate"
        )


def _non_finite_parameter(model: torch.nn.Module) -> str | None:
    return next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)


def first_non_finite_module(model: torch.nn.Module, rerun: Callable[[], object]) -> str | None:
    """Name of the first module, in the order of completion, whose output holds NaN or +inf; None where
    none does.

    -inf does not count: scores are masked with it. rerun: runs the model's forward pass.
    """
    found: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        if not found and not all(_is_finite(each) for each in _tensors(output)):
            found.append(names[module])

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(values: torch.Tensor) -> bool:
    """No NaN and no +inf."""
    return not values.is_floating_point() or bool((values < math.inf).all())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors in a module's output: itself, or inside of sequences, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
