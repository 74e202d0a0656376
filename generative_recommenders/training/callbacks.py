"""Callbacks of a training run: what the trainer tells whoever keeps records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generative_recommenders.training.progress import DivergenceMonitor, PlateauMonitor


class Recorder:
    """Keeps the monitors that a checkpoint holds, and records nothing; subclasses write.

    shows_progress: whether the process shows how far an epoch is.
    """

    shows_progress = False

    def __init__(self) -> None:
        self.divergence, self.plateau = DivergenceMonitor(), PlateauMonitor()

    def state(self) -> dict[str, dict[str, Any]]:
        """State of the divergence and plateau monitors, for a checkpoint."""
        return {"divergence": dict(vars(self.divergence)), "plateau": dict(vars(self.plateau))}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores `state`; ValueError for anything else."""
        for name, monitor in (("divergence", self.divergence), ("plateau", self.plateau)):
            saved = state[name]
            numbers = all(value is None or isinstance(value, (int, float)) for value in saved.values())
            if set(saved) != set(vars(monitor)) or not numbers:
                raise ValueError(f"{name} is {saved!r}")
            vars(monitor).update(saved)

    def step(self, step: int, loss: float, learning_rate: float, quick: Mapping[str, float]) -> None:
        """Every eval_interval steps. quick: metrics of a partial evaluation."""

    def epoch(self, step: int, record: Mapping[str, Any], seconds_left: float = 0.0) -> None:
        """record: epoch (from 0), train_loss, seconds, full, and the metrics. seconds_left: of the whole run."""

    def flush(self) -> None:
        """Before a checkpoint is written."""

    def truncate_after(self, step: int, epoch: int = 0) -> None:
        """Forgets what was recorded behind the state that a run goes on from."""
