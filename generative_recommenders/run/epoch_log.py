"""Records of a run while it trains: a log line an epoch, TensorBoard scalars, metrics.jsonl, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import logging

from generative_recommenders.run.directory import RunFolder
from generative_recommenders.training.progress import DivergenceMonitor, PlateauMonitor, duration

SHOWN = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr")


class EpochLog:
    """Writes to the run folder; does nothing on the other processes, which have none."""

    def __init__(self, run: RunFolder | None, num_epochs: int, part: str) -> None:
        self.run, self.num_epochs, self.part = run, num_epochs, part
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
        if self.run is None:
            return
        values = {"train/loss": loss, "train/learning_rate": learning_rate}
        values.update(
            {f"{self.part}_partial/{name}": quick[name] for name in ("hr@10", "ndcg@10") if name in quick}
        )
        self.run.write_scalars(step, values)
        self.run.write_metrics(step, values)
        self._warn(self.divergence.observe(loss))

    def epoch(self, step: int, record: Mapping[str, Any], seconds_left: float = 0.0) -> None:
        """record: epoch (from 0), train_loss, seconds, full, and the metrics. seconds_left: of the whole run."""
        if self.run is None:
            return
        shown = " ".join(f"{name} {record[name]:.4f}" for name in SHOWN)
        part = self.part if record["full"] else f"{self.part} (part of the users)"
        logging.info(
            "epoch %d/%d  loss %.4f  %s %s  %.0f s, %s left",
            record["epoch"] + 1, self.num_epochs, record["train_loss"], part, shown, record["seconds"],
            duration(seconds_left),
        )  # fmt: skip
        scalars = {
            f"{self.part}/{name}": value
            for name, value in record.items()
            if "@" in name or name in ("mrr", "high_rated_mrr")
        }
        self.run.write_scalars(step, {**scalars, "train/epoch_loss": record["train_loss"]})
        self.run.write_metrics(step, {"part": self.part, **record})
        self._warn(self.plateau.observe(record["train_loss"]))

    @staticmethod
    def _warn(news: str | None) -> None:
        if news is not None:
            logging.warning("%s", news)
