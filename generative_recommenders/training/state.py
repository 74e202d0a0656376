"""State of a run beside its model: progress, and the data it began with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.metrics import current_name


@dataclass
class Progress:
    """Where a run stands, as its checkpoints keep it. best_metric: of validation; None where none was measured."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_metric: float | None = None
    best_epoch: int | None = None
    epochs_without_gain: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_targets: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """ValueError for what no run counts up to: a checkpoint's state may have been written by anybody."""
        for name in ("epoch", "step_in_epoch", "step", "epochs_without_gain"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 62:
                raise ValueError(f"{name} is {value!r}")
        for name in ("seconds", "epoch_loss", "epoch_targets", "best_metric", "best_epoch"):
            absent = name.startswith("best_") and getattr(self, name) is None
            if not absent and not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        for record in self.history if isinstance(self.history, list) else [None]:
            if not isinstance(record, dict) or not {"epoch", "full"} <= record.keys():
                raise ValueError("history is not a list of records")
            if not all(isinstance(value, (int, float)) for value in record.values()):
                raise ValueError(f"history has the record {record!r}")
        self.history = [{current_name(name): value for name, value in each.items()} for each in self.history]


def check_same_data(saved_hash: str, current_hash: str, what: str = "the prepared data") -> None:
    """Refuses to resume on data other than the run began with."""
    if saved_hash != current_hash:
        raise UserError(
            f"{what} changed since this run began (hash {saved_hash} then, {current_hash} now): "
            "restore that data set or start a new run"
        )
