"""The training run: epochs of steps, validation, the best checkpoint, the test at the end.

A run's position is (epoch, step). Everything random in a step is keyed by the seed, the step and the rank, so a resumed
run continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
from absl import logging

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.build.registered import build_part
from generative_recommenders.checkpoint.broadcast import checkpoint_from_main, with_rows
from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.checkpoint.weights import load_model
from generative_recommenders.config.registry import OPTIMIZERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.config.sections import MAX_PREFETCH
from generative_recommenders.data.loader import LoadedBatch, SequenceLoader, prefetch
from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.signals import StopRequested
from generative_recommenders.distributed.sync import raise_on_all_ranks
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.evaluator import EvaluationResult
from generative_recommenders.evaluation.model_evaluation import ModelEvaluation
from generative_recommenders.ops.counter_random import stream_key
from generative_recommenders.retrieval.methods import check_top_k
from generative_recommenders.training.callbacks import Recorder
from generative_recommenders.training.captured_step import CapturedStep, can_capture
from generative_recommenders.training.debug import check_finite, check_finite_parameters
from generative_recommenders.training.optimizers import Optimizer
from generative_recommenders.training.state import Progress, restore_state, write_state
from generative_recommenders.training.step import TABLE, StepResult, TrainingStep

BEST_BY = "ndcg@10"
ACCELERATOR_CHECK = 20
"""Steps between looks at the loss on an accelerator, which each wait for it; on a CPU every step is looked at."""


class Trainer:
    """One process's part of a run. recorder: what keeps its records; nothing does unless given."""

    def __init__(
        self,
        settings: RunSettings,
        dataset: SequenceDataset,
        split: Split,
        collectives: Collectives,
        recorder: Recorder | None = None,
    ) -> None:
        self.settings, self.dataset, self.split = settings, dataset, split
        self.collectives, self.log = collectives, recorder or Recorder()
        data, schedule, updates = settings.data, settings.schedule, settings.updates
        set_precision(settings, collectives.device)
        torch.manual_seed(schedule.random_seed)
        self.catalogue = Catalogue.of(dataset, split.train_stops, settings.items.category_feature)
        self.task = build_task(settings, self.catalogue, collectives)
        self.model = self.task.model
        check_top_k(settings, self.model)
        self.loader = SequenceLoader(
            dataset, split.train_stops, data.max_sequence_length, schedule.local_batch_size, schedule.random_seed,
            data.positional_sampling_ratio, collectives.rank, collectives.world_size, data.training_windows,
        )  # fmt: skip
        if len(self.loader) == 0:
            raise UserError(f"{data.dataset_name}: no user has 2 training events; there is nothing to learn from")
        items = self.model.items
        rates = {"learning_rate": updates.learning_rate, "weight_decay": updates.weight_decay}
        optimizer = Optimizer(
            [p for p in self.task.parameters() if p is not items.table], items.table,
            build_part(settings, OPTIMIZERS, updates.optimizer, rates), updates.num_warmup_steps, updates.max_grad_norm,
            schedule.num_epochs * len(self.loader) if updates.learning_rate_schedule == "cosine" else None,
            None if items.shard is None else collectives.sum_, items.kept,
        )  # fmt: skip
        self.task.updates_rows = optimizer.sparse is not None
        parts = self.task, optimizer, collectives
        self.step = CapturedStep(*parts, schedule.local_batch_size) if can_capture(*parts) else TrainingStep(*parts)
        if collectives.world_size > 1 and collectives.is_main:
            logging.info(
                "%d processes evaluate exactly as one does, and train as one to float rounding where nothing is "
                "dropped out or train_fn.deterministic is set (bf16 and losses that warn of it excepted)",
                collectives.world_size,
            )
        self.frozen = [name for name, each in self.task.named_parameters() if not each.requires_grad]
        self.evaluation = ModelEvaluation(settings, dataset, split, collectives)
        self.picks_best = self._has_validation()
        self.progress = Progress()
        self.saved_at = perf_counter()
        self.saved_position: tuple[int, int] | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`Catalogue.facts`, which training does not change."""
        return self.catalogue.facts(self.model, self.dataset)

    def _has_validation(self) -> bool:
        """Whether the split has targets to pick an epoch by; a warning where it should have."""
        data = self.settings.data
        if data.protocol == "paper":  # the test targets stand in for them, and pick nothing
            return False
        if bool((self.split.validation_targets >= 0).any()):
            return True
        if self.settings.schedule.early_stopping_patience is not None:
            raise UserError(
                f"{data.dataset_name} has no validation targets under protocol {data.protocol!r}, which "
                "train_fn.early_stopping_patience needs: unset it"
            )
        if self.collectives.is_main:
            logging.warning(
                "%s has no validation targets under protocol %r: validation metrics are 0, and the last epoch is kept",
                data.dataset_name, data.protocol,
            )  # fmt: skip
        return False

    # -- running ------------------------------------------------------------------------------------------------

    def train(
        self,
        store: CheckpointStore | None = None,
        max_steps: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[], None] = lambda: None,
    ) -> EvaluationResult | None:
        """Trains to the end (or to max_steps, or until stop() on any process), then scores the test targets: those of
        the best (in protocol "paper", the last) state. None after a stop.

        store: where the main process keeps checkpoints. on_step: called after each step, for a profiler.
        """
        p, epoch_length = self.progress, len(self.loader)
        last_step = p.step + (self.settings.schedule.num_epochs - p.epoch) * epoch_length - p.step_in_epoch
        if max_steps is not None:
            last_step = min(last_step, max_steps)
        self.log.begin(p.step, last_step, p.seconds)
        try:
            while not self.is_done(max_steps):
                # A run that stopped in an evaluation resumes after the last step of its epoch.
                if p.step_in_epoch < epoch_length:
                    self._steps(store, last_step, stop, on_step)
                if p.step_in_epoch == epoch_length:
                    self._end_of_epoch(store, stop)
        except StopRequested:
            self._save_unless_saved(store)
            self.collectives.barrier()  # no rank exits before the checkpoint is written, since that aborts its peers
            return None
        # The last state is saved before the best one replaces it here: further epochs continue from the last.
        self._save_unless_saved(store)
        self._load_best(store)
        try:
            with self.log.timed("test"):
                return self.evaluation.test(self.model, stop)
        except StopRequested:
            return None

    def is_done(self, max_steps: int | None = None) -> bool:
        """Whether nothing is left of `train` before the test: no step, and no validation."""
        schedule, p = self.settings.schedule, self.progress
        patience = math.inf if schedule.early_stopping_patience is None else schedule.early_stopping_patience
        if p.epoch >= schedule.num_epochs or p.epochs_without_gain >= patience:
            return True
        return max_steps is not None and p.step >= max_steps and p.step_in_epoch < len(self.loader)

    def _steps(
        self,
        store: CheckpointStore | None,
        last_step: int,
        stop: Callable[[], bool],
        on_step: Callable[[], None],
    ) -> None:
        """Steps to the epoch's end or to the last one, with a checkpoint every checkpoint_minutes; StopRequested where
        any process is asked to stop."""
        p = self.progress
        self.model.train()
        waiting: list[tuple[LoadedBatch, StepResult]] = []
        check_every = 1 if self.collectives.device.type == "cpu" else ACCELERATOR_CHECK
        batches = self.loader.epoch(p.epoch, p.step_in_epoch)
        ready = prefetch(batches, min(self.settings.loader.prefetch_factor, MAX_PREFETCH))
        began = perf_counter() - p.seconds
        for loaded in self.log.watch(ready, len(self.loader), p.step_in_epoch, p.epoch):
            waiting.append((loaded, self.run_step(loaded)))
            recorded = self._is_recorded(p.step)
            if recorded or len(waiting) >= check_every:
                self.account(waiting)
            p.seconds = perf_counter() - began
            if recorded:
                with self.log.timed("evaluation"):
                    quick = self.evaluation.validation(self.model, 1, draw=p.step).metrics()
                self.log.step(p.step, self.last, p.seconds, quick)
            on_step()
            stopping, saving = self.agreed(stop())
            if stopping or saving:
                self.account(waiting)
            if stopping:
                raise StopRequested
            if saving:
                self.save(store)
            if recorded or saving:
                began = perf_counter() - p.seconds  # evaluations and checkpoints do not count
            if p.step >= last_step:
                break
        self.account(waiting)

    def agreed(self, stop: bool) -> tuple[bool, bool]:
        """Whether any process is to stop, and whether the main one finds a checkpoint due: in one exchange, so that all
        processes do the same."""
        due = perf_counter() - self.saved_at >= 60 * self.settings.checkpoints.checkpoint_minutes
        asked = self.collectives.sum_(torch.tensor([float(stop), float(due and self.collectives.is_main)]))
        return bool(asked[0] > 0), bool(asked[1] > 0)

    def run_step(self, loaded: LoadedBatch) -> StepResult:
        """One step on a loaded batch."""
        p = self.progress
        self._seed(p.step)
        self.step.measures_norm = self._is_recorded(p.step + 1)
        result = self.step(loaded, p.step)
        p.step, p.step_in_epoch = p.step + 1, p.step_in_epoch + 1
        return result

    def _is_recorded(self, step: int) -> bool:
        """Whether the numbers of a step, counted from 1, are recorded, with a partial evaluation."""
        return step % self.settings.evaluation.eval_interval == 0

    def _seed(self, step: int) -> None:
        """torch's generators, which dropout draws from: what it draws depends on the seed, the step and the rank
        alone."""
        key = stream_key(self.settings.schedule.random_seed, step, self.collectives.rank)
        # In a hundredth of the time of `torch.manual_seed`, which looks for devices of all kinds.
        torch.default_generator.manual_seed(key)
        if self.collectives.device.type == "cuda":
            torch.cuda.manual_seed(key)

    def account(self, waiting: list[tuple[LoadedBatch, StepResult]]) -> None:
        """Adds finished steps, the last of them the newest, to the epoch's loss; the first that is not finite ends the
        run."""
        p = self.progress

        def rerun(loaded: LoadedBatch, step: int) -> None:
            self._seed(step)  # the same draws again
            self.step.forward(self.task.prepare(loaded, step))

        for step, (loaded, result) in enumerate(waiting, start=p.step - len(waiting)):
            loss, targets = float(result.loss), float(result.targets)
            if self.model.items.shard is not None and not math.isfinite(loss):
                self._check_parameters()  # one process's rows may be the cause, and to rerun the step takes all
            check_finite(loss, step + 1, self.task, partial(rerun, loaded, step), self.collectives)
            p.epoch_loss, p.epoch_targets = p.epoch_loss + loss * targets, p.epoch_targets + targets
            self.last = result
        waiting.clear()

    def _end_of_epoch(self, store: CheckpointStore | None, stop: Callable[[], bool]) -> None:
        p = self.progress
        self._check_parameters()
        evaluation = self.settings.evaluation
        full = p.epoch + 1 >= self.settings.schedule.num_epochs or p.epoch % evaluation.full_eval_every_n == 0
        with self.log.timed("evaluation"):
            most = None if full else evaluation.partial_eval_num_iters
            result = self.evaluation.validation(self.model, most, stop, p.epoch)
        metrics = result.all_metrics() if full else result.metrics()
        # Of a sample of the users: how far its mean is from that of all.
        if errors := self.evaluation.standard_errors(result, self.settings.measured_part):
            metrics[f"{BEST_BY}_standard_error"] = errors[BEST_BY]
        loss = p.epoch_loss / max(p.epoch_targets, 1.0)
        p.history.append({"epoch": p.epoch, "train_loss": loss, "seconds": p.seconds, "full": full, **metrics})
        better = full and self.picks_best and (p.best_metric is None or metrics[BEST_BY] > p.best_metric)
        if better:
            p.best_metric, p.best_epoch, p.epochs_without_gain = metrics[BEST_BY], p.epoch, 0
        elif full:
            p.epochs_without_gain += 1
        self.log.epoch(p.step, p.history[-1])
        due = p.epoch > 0 and p.epoch % self.settings.checkpoints.save_ckpt_every_n == 0
        # Before the checkpoint, so that a run resumed from it begins the next epoch.
        p.epoch, p.step_in_epoch, p.epoch_loss, p.epoch_targets = p.epoch + 1, 0, 0.0, 0.0
        if better or due:
            self.save(store, metrics[BEST_BY], better)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self, store: CheckpointStore | None, metric: float | None = None, is_best: bool = False) -> None:
        """Model, loss, optimizer and progress, by the main process alone; NonFiniteError, on all, before they are
        spoilt."""
        self.saved_at = perf_counter()
        self.saved_position = None if store is None else (self.progress.epoch, self.progress.step)
        self._check_parameters()  # on all processes, of which some leave here: the main one alone writes a whole table
        if store is None or not (self.collectives.is_main or self.model.items.shard is not None):
            return
        with self.log.timed("checkpoints"):
            write_state(self, store, metric, is_best)

    def _save_unless_saved(self, store: CheckpointStore | None) -> None:
        """No second checkpoint of one place, which would cost an older one its own."""
        if self.saved_position != (self.progress.epoch, self.progress.step):
            self.save(store)

    def _check_parameters(self) -> None:
        """NonFiniteError, on all processes, where one holds weights that are not finite."""
        raise_on_all_ranks(self.collectives, lambda: check_finite_parameters(self.progress.step, self.task))

    restore = restore_state  # in the module that also says what a checkpoint holds

    def _load_best(self, store: CheckpointStore | None) -> None:
        """The best state on every process, as the main one reads it; the last one is kept where that is lost."""
        epoch = self.progress.best_epoch
        if store is None or epoch is None:
            return
        best = checkpoint_from_main(self.collectives, store.load_best)
        if best is not None and best.position.epoch == epoch + 1:
            rows = with_rows(self.collectives, best, [TABLE], self.model.items.shard)
            load_model(self.model, rows)
            return
        self.progress.best_epoch = None
        if self.collectives.is_main:
            logging.warning("the checkpoint of the best epoch, %d, cannot be read: the last state is scored", epoch + 1)


def set_precision(settings: RunSettings, device: torch.device) -> None:
    """TF32 and determinism."""
    torch.backends.cuda.matmul.allow_tf32 = settings.schedule.enable_tf32
    torch.backends.cudnn.allow_tf32 = settings.schedule.enable_tf32
    if torch.are_deterministic_algorithms_enabled() != settings.schedule.deterministic:
        # Only where it changes: the call imports torch's compiler, which takes a second.
        torch.use_deterministic_algorithms(settings.schedule.deterministic)
    if settings.schedule.enable_tf32 and device.type == "cpu":
        logging.info("train_fn.enable_tf32: a CPU has no TF32; float32 is used")
