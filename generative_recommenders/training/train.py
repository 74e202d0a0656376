"""The training run: epochs of steps, validation, the best checkpoint, the test at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from absl import logging
from tqdm import tqdm

from ..data.batching import EvaluationLoader, LoadedBatch, SequenceLoader, prefetch
from ..data.sequence_dataset import SequenceDataset
from ..data.splits import Split
from ..evaluation.collectives import Collectives
from ..evaluation.evaluator import EvaluationResult, Evaluator
from ..features import UserError
from ..objectives.counter_random import stream_key
from .assembly import MASKING_SCHEMES, Catalogue, build_criterion, build_model, build_objective, build_sampler
from .checkpoint import Checkpoint, CheckpointStore
from .inference import InferenceInputs
from .optimizers import Optimizer
from .random_state import random_state, restore_random_state
from .run_folder import RunFolder, check_same_data
from .scoring_catalogue import CatalogueScores
from .settings import RunSettings
from .step import StepResult, TrainingStep

BEST_BY = "ndcg@10"
MAX_PREFETCH = 64


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
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """test: metrics of the best (or, in protocol "paper", the last) state; finished: False after a stop request."""

    test: dict[str, float]
    test_liked: dict[str, float]
    progress: Progress
    finished: bool


class Trainer:
    """One process's part of a run. run: its folder, on the main process alone."""

    def __init__(
        self,
        settings: RunSettings,
        dataset: SequenceDataset,
        split: Split,
        collectives: Collectives,
        run: RunFolder | None = None,
    ) -> None:
        self.settings, self.dataset, self.split = settings, dataset, split
        self.collectives, self.run_folder = collectives, run
        t = settings.train
        set_precision(settings, collectives.device)
        torch.manual_seed(t.random_seed)
        self.catalogue = Catalogue.of(dataset, split.train_stops, t.category_feature)
        self.model = build_model(settings, self.catalogue).to(collectives.device)
        self.objective = build_objective(settings)
        criterion = build_criterion(settings, self.catalogue).to(collectives.device)
        sampler = build_sampler(settings, self.catalogue).to(collectives.device) if criterion.needs_negatives else None
        dense = [p for name, p in self.model.named_parameters() if name != "items.table"]
        self.optimizer = Optimizer(
            [*dense, *criterion.parameters()], self.model.items.table, t.optimizer,
            t.learning_rate, t.weight_decay, t.num_warmup_steps, t.max_grad_norm,
        )  # fmt: skip
        autocast = torch.bfloat16 if t.main_module_bf16 else None
        self.step = TrainingStep(
            self.model, criterion, sampler, self.optimizer, collectives, t.random_seed, autocast
        )
        torch.manual_seed(stream_key(t.random_seed, collectives.rank))
        self.loader = SequenceLoader(
            dataset, split.train_stops, t.max_sequence_length, t.local_batch_size, t.random_seed,
            t.positional_sampling_ratio, collectives.rank, collectives.world_size,
        )  # fmt: skip
        if len(self.loader) == 0:
            raise UserError(f"{t.dataset_name}: no user has 2 training events; there is nothing to learn from")
        self.progress = Progress()

    # -- running ------------------------------------------------------------------------------------------------

    def train(self, store: CheckpointStore | None, max_steps: int | None = None, stop=lambda: False) -> TrainResult:
        """Trains to the end (or to max_steps, or until stop() on any process), then scores the test targets."""
        t = self.settings.train
        finished = True
        while self.progress.epoch < t.num_epochs and finished and not self._out_of_patience():
            finished = self._epoch(max_steps, stop)
            if finished:
                self._end_of_epoch(store)
            if max_steps is not None and self.progress.step >= max_steps:
                break
        if store is not None and self.collectives.is_main:
            self.save(store)
        if not finished:
            return TrainResult({}, {}, self.progress, False)
        self._load_best(store)
        result = self.evaluate(self.split.test_targets, self.split.unseen_test_targets)
        return TrainResult(result.metrics(), result.liked_metrics(), self.progress, True)

    def _epoch(self, max_steps: int | None, stop) -> bool:
        """Steps until the epoch's end; False where a stop was asked for."""
        self.model.train()
        started, losses, targets = time.perf_counter(), 0.0, 0.0
        for loaded in self._progress_bar(self._batches()):
            result = self.run_step(loaded)
            losses, targets = losses + float(result.loss) * result.targets, targets + result.targets
            if not torch.isfinite(result.loss):
                raise FloatingPointError(f"the loss was {float(result.loss)} at step {self.progress.step}")
            if self.progress.step % self.settings.train.eval_interval == 0:
                self._log_step(result)
            if max_steps is not None and self.progress.step >= max_steps:
                break
            if self.collectives.any(stop()):
                self.progress.seconds += time.perf_counter() - started
                return False
        self.progress.seconds += time.perf_counter() - started
        self.progress.history.append({"epoch": self.progress.epoch, "train_loss": losses / max(targets, 1.0)})
        return True

    def _batches(self) -> Iterator[LoadedBatch]:
        batches = self.loader.epoch(self.progress.epoch, self.progress.step_in_epoch)
        return prefetch(batches, min(self.settings.loader.prefetch_factor, MAX_PREFETCH))

    def run_step(self, loaded: LoadedBatch) -> StepResult:
        key = stream_key(self.settings.train.random_seed, self.progress.step, self.collectives.rank, 7)
        generator = torch.Generator().manual_seed(key)
        example = self.objective.example(loaded.columns, generator).to(self.collectives.device)
        first_target = self.objective.first_target(loaded.first_row, loaded.first_token)
        result = self.step(example, first_target, self.progress.step)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        return result

    # -- evaluating ---------------------------------------------------------------------------------------------

    def evaluate(self, targets, unseen, max_batches: int | None = None) -> EvaluationResult:
        """Exact ranks of the targets by the model as it is."""
        t = self.settings.train
        self.model.eval()
        scheme = MASKING_SCHEMES[t.objective](self.settings) if t.objective in MASKING_SCHEMES else None
        autocast = torch.bfloat16 if t.eval_bf16 else None
        score = CatalogueScores(
            self.model, InferenceInputs(scheme), t.item_l2_norm, t.l2_norm_eps, self.collectives.device, autocast
        )
        evaluator = Evaluator(
            self.evaluation_loader(targets), self.dataset.num_items, t.seen_filter, self.collectives,
            torch.from_numpy(unseen), t.rating_threshold,
        )  # fmt: skip
        result = evaluator(score, max_batches)
        self.model.train()
        return result

    def evaluation_loader(self, targets) -> EvaluationLoader:
        t = self.settings.train
        batch_size = min(t.eval_batch_size, t.eval_user_max_batch_size or t.eval_batch_size)
        world = self.collectives
        return EvaluationLoader(
            self.dataset, targets, t.max_sequence_length, batch_size, world.rank, world.world_size
        )

    def _end_of_epoch(self, store: CheckpointStore | None) -> None:
        t, p = self.settings.train, self.progress
        record = p.history[-1]
        paper = t.protocol == "paper"
        targets = self.split.test_targets if paper else self.split.validation_targets
        unseen = self.split.unseen_test_targets if paper else self.split.unseen_validation_targets
        full = p.epoch % t.full_eval_every_n == 0 or p.epoch + 1 >= t.num_epochs
        result = self.evaluate(targets, unseen, None if full else t.partial_eval_num_iters)
        metrics = result.metrics()
        record.update({"seconds": p.seconds, "full": full, **metrics})
        better = full and not paper and (p.best_metric is None or metrics[BEST_BY] > p.best_metric)
        if better:
            p.best_metric, p.best_epoch, p.epochs_without_gain = metrics[BEST_BY], p.epoch, 0
        elif full:
            p.epochs_without_gain += 1
        p.epoch, p.step_in_epoch = p.epoch + 1, 0
        self._log_epoch(record, "test" if paper else "validation")
        if store is not None and self.collectives.is_main and (better or p.epoch % t.save_ckpt_every_n == 0):
            self.save(store, metrics[BEST_BY], better)

    def _out_of_patience(self) -> bool:
        patience = self.settings.train.early_stopping_patience
        return patience is not None and self.progress.epochs_without_gain >= patience

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self, store: CheckpointStore, metric: float | None = None, is_best: bool = False) -> None:
        """Model, optimizer, generators and progress."""
        generators, generator_state = random_state()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors.update({f"optimizer.{name}": value for name, value in self.optimizer.state_tensors().items()})
        tensors.update(generators)
        state = {
            "progress": vars(self.progress),
            "generators": generator_state,
            "data_hash": self.dataset.manifest.data_hash,
            "split_hash": self.split.hash,
            "world_size": self.collectives.world_size,
        }
        if self.run_folder is not None:
            self.run_folder.flush()
        store.save((self.progress.epoch, self.progress.step), tensors, state, metric, is_best)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: refused on other data; says so at another number of processes."""
        check_same_data(checkpoint.state["split_hash"], self.split.hash)
        load_model(self.model, checkpoint)
        prefix = "optimizer."
        self.optimizer.load_state_tensors(
            {name[len(prefix) :]: x for name, x in checkpoint.tensors.items() if name.startswith(prefix)}
        )
        self.progress = Progress(**checkpoint.state["progress"])
        saved_world = checkpoint.state["world_size"]
        if saved_world == self.collectives.world_size:
            restore_random_state(checkpoint.tensors, checkpoint.state["generators"])
        else:
            self.progress.step_in_epoch = self.progress.step_in_epoch * saved_world // self.collectives.world_size
            logging.warning(
                "resuming a run of %d processes on %d: dropout draws and the global batch differ from here on",
                saved_world, self.collectives.world_size,
            )  # fmt: skip
        if self.run_folder is not None:
            self.run_folder.truncate_after(self.progress.step)

    def _load_best(self, store: CheckpointStore | None) -> None:
        best = store.load_best() if store is not None and self.progress.best_epoch is not None else None
        if best is not None:
            load_model(self.model, best)

    # -- logging ------------------------------------------------------------------------------------------------

    def _progress_bar(self, batches: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
        epoch = f"epoch {self.progress.epoch + 1}/{self.settings.train.num_epochs}"
        return tqdm(
            batches, desc=epoch, total=len(self.loader), initial=self.progress.step_in_epoch,
            disable=not self.collectives.is_main, leave=False, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip

    def _log_step(self, result: StepResult) -> None:
        if self.run_folder is not None:
            values = {"train/loss": float(result.loss), "train/learning_rate": result.learning_rate}
            self.run_folder.write_scalars(self.progress.step, values)
            self.run_folder.write_metrics(self.progress.step, values)

    def _log_epoch(self, record: Mapping[str, Any], part: str) -> None:
        if not self.collectives.is_main:
            return
        shown = " ".join(f"{name} {record[name]:.4f}" for name in ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr"))
        logging.info(
            "epoch %d/%d  loss %.4f  %s%s %s  %.0f s", record["epoch"] + 1, self.settings.train.num_epochs,
            record["train_loss"], part, "" if record["full"] else " (part)", shown, record["seconds"],
        )  # fmt: skip
        if self.run_folder is not None:
            scalars = {f"{part}/{k}": v for k, v in record.items() if "@" in k or k == "mrr"}
            self.run_folder.write_scalars(self.progress.step, {**scalars, "train/epoch_loss": record["train_loss"]})
            self.run_folder.write_metrics(self.progress.step, {"part": part, **record})


def load_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The checkpoint's weights; UserError where they do not fit the model."""
    prefix = "model."
    state = {name[len(prefix) :]: x for name, x in checkpoint.tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint.path} does not fit the configuration: {first}") from error


def set_precision(settings: RunSettings, device: torch.device) -> None:
    """TF32, determinism, and a line where a switch cannot act here."""
    t = settings.train
    torch.backends.cuda.matmul.allow_tf32 = t.enable_tf32
    torch.backends.cudnn.allow_tf32 = t.enable_tf32
    torch.use_deterministic_algorithms(t.deterministic)
    if t.enable_tf32 and device.type == "cpu":
        logging.info("train_fn.enable_tf32: a CPU has no TF32; float32 is used")
