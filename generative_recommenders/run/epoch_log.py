"""Records of a run while it trains: a log line an epoch, TensorBoard scalars, metrics.jsonl, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

from absl import logging
from tqdm import tqdm

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.distributed.progress import progress_bar
from generative_recommenders.run.directory import RunFolder
from generative_recommenders.run.summary import COLUMNS
from generative_recommenders.training.callbacks import Recorder, T
from generative_recommenders.training.step import StepResult


class EpochLog(Recorder):
    """Writes to the run folder."""

    def __init__(self, run: RunFolder, num_epochs: int, part: str) -> None:
        super().__init__()
        self.run, self.num_epochs, self.part = run, num_epochs, part
        self.tokens = 0

    @classmethod
    def of(cls, run: RunFolder | None, settings: RunSettings) -> Recorder:
        """A recorder that writes nothing on the processes that have no folder."""
        if run is None:
            return Recorder()
        return cls(run, settings.schedule.num_epochs, settings.measured_part)

    def begin(self, step: int, last_step: int, seconds: float = 0.0) -> None:
        self.began, self.first_step, self.last_step = perf_counter(), step, last_step
        self.seconds_before = seconds

    def watch(self, batches: Iterable[T], total: int, done: int, epoch: int) -> Iterable[T]:
        ready = iter(progress_bar(batches, total, f"epoch {epoch + 1}/{self.num_epochs}", done))
        while True:
            with self.timed("waiting for batches"):
                batch = next(ready, None)
            if batch is None:
                return
            self.tokens += getattr(batch, "global_tokens", 0)
            yield batch

    def flush(self) -> None:
        self.run.flush()

    def truncate_after(self, step: int, epoch: int = 0) -> None:
        self.run.truncate_after(step, epoch)

    def step(self, step: int, result: StepResult, seconds: float, quick: Mapping[str, float]) -> None:
        """See `Recorder.step`. Tokens are next-item targets of all processes; evaluations and checkpoints take none of
        their time."""
        loss = float(result.loss)
        values = {"train/loss": loss, "train/learning_rate": result.learning_rate}
        if result.gradient_norm is not None:
            values["train/gradient_norm"] = float(result.gradient_norm)
        if seconds > self.seconds_before:
            values["train/tokens_per_second"] = self.tokens / (seconds - self.seconds_before)
        self.tokens, self.seconds_before = 0, seconds
        values.update({f"{self.part}_partial/{name}": quick[name] for name in ("hr@10", "ndcg@10") if name in quick})
        self.run.write_scalars(step, values)
        self.run.write_metrics(step, values)
        self._warn(self.divergence.observe(loss))

    def epoch(self, step: int, record: Mapping[str, Any]) -> None:
        """record: epoch (from 0), train_loss, seconds, full, and the metrics; of some ``.._standard_error``."""
        # The whole run's time, at the speed since it began: evaluations and checkpoints included.
        seconds, steps = perf_counter() - self.began, step - self.first_step
        if not steps:  # resumed at the end of an epoch, in its evaluation
            seconds, steps = record["seconds"], max(step, 1)
        seconds_a_step = seconds / steps
        left = tqdm.format_interval(seconds_a_step * max(self.last_step - step, 0))
        errors = {name: record.get(f"{name}_standard_error") for name in COLUMNS}
        shown = " ".join(
            f"{name} {record[name]:.4f}" + ("" if errors[name] is None else f" ± {errors[name]:.4f}")
            for name in COLUMNS
        )
        part = self.part if record["full"] else f"{self.part} (part of the users)"
        logging.info(
            "epoch %d/%d  loss %.4f  %s %s  %.0f s, %s left",
            record["epoch"] + 1, self.num_epochs, record["train_loss"], part, shown, record["seconds"], left,
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
