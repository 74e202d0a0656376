"""Callbacks of a training run: the events that the trainer reports to a recorder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from generative_recommenders.training.step import StepResult

T = TypeVar("T")


STATE: ConfigDict = {"strict": True, "extra": "forbid"}
"""Of dataclasses that a checkpoint holds: it may have been written by anybody."""


@dataclass(config=STATE)
class PlateauMonitor:
    """A warning when a loss has not fallen by ``min_change`` of its best value ``patience`` times in a row; once a
    plateau."""

    patience: int = 10
    min_change: float = 1e-3
    best: float | None = None
    without_gain: int = 0

    def observe(self, loss: float) -> str | None:
        """The warning, or None."""
        if self.best is None or self.best - loss > self.min_change * abs(self.best):
            self.best, self.without_gain = loss, 0
            return None
        self.without_gain += 1
        if self.without_gain != self.patience:
            return None
        return f"the loss has not fallen below {self.best:.5g} for {self.patience} observations: a plateau"


@dataclass(config=STATE)
class DivergenceMonitor:
    """A warning when the smoothed loss has risen to ``factor`` times its lowest value; once until it has come down
    again.

    smoothing: weight of the past in the moving average, so that one hard batch is not taken for divergence.
    """

    factor: float = 2.0
    smoothing: float = 0.95
    average: float | None = None
    lowest: float | None = None
    warned: bool = False

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


class Recorder:
    """Keeps what a checkpoint holds of the course of a run, and records nothing; subclasses write.

    Attributes:
        spent: seconds by what they were spent on, see `timed`.
    """

    def __init__(self) -> None:
        self.divergence, self.plateau = DivergenceMonitor(), PlateauMonitor()
        self.spent: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time of the block to ``spent[what]``."""
        began = perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + perf_counter() - began

    def state(self) -> dict[str, dict[str, Any]]:
        """State of the divergence and plateau monitors, and the time spent, for a checkpoint."""
        return {
            "divergence": asdict(self.divergence),
            "plateau": asdict(self.plateau),
            "spent": dict(self.spent),
        }

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores `state`; ValueError for anything else."""
        self.divergence = DivergenceMonitor(**state["divergence"])
        self.plateau = PlateauMonitor(**state["plateau"])
        spent = state.get("spent", {})  # which releases before 0.2.0 did not count
        self.spent = TypeAdapter(dict[str, float]).validate_python(spent, strict=True)

    def begin(self, step: int, last_step: int, seconds: float = 0.0) -> None:
        """Training starts, or resumes after ``step``, up to which all steps took ``seconds``, and ends at ``last_step``
        at the latest."""

    def watch(self, batches: Iterable[T], total: int, done: int, epoch: int) -> Iterable[T]:
        """The batches as they are; a recorder may show how many of the epoch's ``total`` are done."""
        return batches

    def step(self, step: int, result: StepResult, seconds: float, quick: Mapping[str, float]) -> None:
        """Every eval_interval steps. result: of the last one. seconds: of all steps of the run. quick: metrics of a
        partial evaluation."""

    def epoch(self, step: int, record: Mapping[str, Any]) -> None:
        """record: epoch (from 0), train_loss, seconds, full, and the metrics."""

    def flush(self) -> None:
        """Before a checkpoint is written."""

    def truncate_after(self, step: int, epoch: int = 0) -> None:
        """Discards what was recorded after ``step``, in ``epoch``, from which the run resumes."""
