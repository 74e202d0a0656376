"""Lightning module over this program's training tasks and over models of RePlay's form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch

from generative_recommenders.data.loader import LoadedBatch
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.errors import UserError
from generative_recommenders.lightning.optimization import (
    BaseLRSchedulerFactory,
    BaseOptimizerFactory,
    OptimizerFactory,
)
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.modeling.similarity.interface import Snapshot
from generative_recommenders.objectives.task import TrainingTask
from generative_recommenders.ops.counter_random import stream_key

CANDIDATES = "candidates_to_score"


class LightningModule(lightning.LightningModule):
    """A model under Lightning's trainer.

    model: one of three kinds.
        A module of RePlay's form (compat's ``SasRec`` and ``TwoTower``): called with the keys of the batch that its
            forward takes; returns a mapping with "loss" in training mode, with "logits" and "hidden_states" in
            evaluation mode.
        A `TrainingTask`: trains on the batches of `DataModule` as main.py does, draws and loss alike.
        A `SequenceRecommender` alone: gives scores, and cannot be trained.
    The scores of the latter two are ``[B, V + 1]``: column i is item id i, and column 0, padding, is -inf.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer_factory: BaseOptimizerFactory | None = None,
        lr_scheduler_factory: BaseLRSchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._optimizer_factory = optimizer_factory or OptimizerFactory()
        self._lr_scheduler_factory = lr_scheduler_factory
        self._candidates: torch.Tensor | None = None
        self._snapshot: Snapshot | None = None
        self._micro_batch = 0
        parameters = inspect.signature(model.forward).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters}
        self._needs = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]

    @property
    def candidates_to_score(self) -> torch.Tensor | None:
        """int64 ``[C]`` distinct item ids to score instead of the catalogue, None for all; not read in training. A
        batch's own, under this name, take precedence."""
        return self._candidates

    @candidates_to_score.setter
    def candidates_to_score(self, candidates: torch.Tensor | None) -> None:
        self._candidates = _checked_candidates(candidates)

    def forward(self, batch: Any) -> Mapping[str, Any]:
        """The model's output for a batch, whose other keys are for callbacks. A recommender reads the batch's group
        "history", or the batch itself where there is no such group.

        UserError where the model needs a key that the batch lacks.
        """
        if self._recommender is not None:
            return self._training_output(batch) if self.training else self._scores(self._recommender, batch)
        given = dict(batch)
        if not self.training and (candidates := self._candidates_of(batch)) is not None:
            if not self._takes_all and CANDIDATES not in self._takes:
                raise UserError(
                    f"{type(self.model).__name__} takes no {CANDIDATES}: set it to None, to score all items"
                )
            given[CANDIDATES] = candidates
        _check_keys(self.model, self._needs, given)
        if not self._takes_all:
            given = {name: x for name, x in given.items() if name in self._takes}
        return self.model(**given)

    @property
    def _recommender(self) -> SequenceRecommender | None:
        """The program's model, alone or of a task; None for a module of RePlay's form."""
        model = self.model.model if isinstance(self.model, TrainingTask) else self.model
        return model if isinstance(model, SequenceRecommender) else None

    def _candidates_of(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """The batch's own candidates, else the module's, on its device."""
        own = batch.get(CANDIDATES)
        candidates = self._candidates if own is None else _checked_candidates(own)
        return None if candidates is None else candidates.to(self.device)

    def _scores(self, model: SequenceRecommender, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Scores of the histories of a batch with the candidates, or with all items and padding."""
        history = batch.get("history", batch)
        _check_keys(model, ("item_ids", "lengths"), history)
        queries = model.encode_query(history)
        if (candidates := self._candidates_of(batch)) is not None:
            logits = model.score(queries, candidates)
        else:
            snapshot = self._snapshot if self._snapshot is not None else model.catalogue()
            logits = torch.nn.functional.pad(model.score(queries, snapshot), (1, 0), value=-torch.inf)
        return {"logits": logits, "hidden_states": (queries.states,)}

    def _training_output(self, batch: Any) -> Mapping[str, Any]:
        """The loss of a loaded batch, under main.py's draws."""
        task = self.model
        if not isinstance(task, TrainingTask):
            raise UserError("a model alone has no loss: give LightningModule the task of build_task(...)")
        if not isinstance(batch, LoadedBatch):
            raise UserError("a training task reads the batches of DataModule: give the trainer one")
        # The step's number, and above it the batch's place among those whose gradients it accumulates.
        step, world = self.global_step + (self._micro_batch << 32), task.collectives.world_size
        # Dropout draws from torch's generator, which main.py's trainer seeds anew each step.
        torch.manual_seed(stream_key(task.seed, step, task.collectives.rank))
        output = task.loss(batch, step)
        total = task.collectives.sum_(output.weight.detach().clone())
        loss = output.sum / total.clamp(min=1e-12)
        auxiliary = torch.zeros_like(loss) + sum(output.auxiliary.values())  # of all processes already
        # DDP averages gradients over processes, and the logger averages values; both should be sums.
        return {"loss": (loss + auxiliary) * world - auxiliary.detach() * (world - 1)}

    def setup(self, stage: str) -> None:
        """Tells the task of the processes that Lightning has started."""
        if isinstance(self.model, TrainingTask):
            # The module itself is moved to this device after its setup.
            self.model.collectives = process_collectives(self.trainer.strategy.root_device)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        loss: torch.Tensor = self(batch)["loss"]
        rows = _rows(batch)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("learning_rate", rate, on_step=True, on_epoch=True, batch_size=rows)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=rows)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Mapping[str, Any]:
        return self(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_factory.create([p for p in self.model.parameters() if p.requires_grad])
        if self._lr_scheduler_factory is None:
            return optimizer
        return [optimizer], [self._lr_scheduler_factory.create(optimizer)]

    def on_validation_epoch_start(self) -> None:
        """Scores the items once for all batches of an evaluation."""
        if self._recommender is not None:
            self._snapshot = self._recommender.catalogue()

    def on_validation_epoch_end(self) -> None:
        self._snapshot = None  # the next step of training changes the items

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end


def _checked_candidates(candidates: torch.Tensor | None) -> torch.Tensor | None:
    """UserError for anything but a list of distinct item ids."""
    if candidates is not None and (
        candidates.dim() != 1
        or candidates.dtype != torch.int64
        or len(candidates.unique()) != len(candidates)
        or (candidates < 0).any()
    ):
        raise UserError(
            "candidates_to_score must be distinct item ids from 0 on, int64 [C], "
            f"not {candidates.dtype} {list(candidates.shape)}"
            + (" with repeats or ids below 0" if candidates.dim() == 1 else "")
        )
    return candidates


def _check_keys(model: torch.nn.Module, needed: Sequence[str], batch: Mapping[str, Any]) -> None:
    missing = [name for name in needed if name not in batch]
    if missing:
        raise UserError(
            f"{type(model).__name__} needs {', '.join(missing)}, and the batch has {', '.join(map(str, batch))}: "
            "see the transforms of the data module"
        )


def _rows(batch: Any) -> int:
    """Rows of a batch, or of the first tensor in it."""
    columns = batch.columns if isinstance(batch, LoadedBatch) else batch
    first = next(iter(columns.values()))
    return _rows(first) if isinstance(first, Mapping) else len(first)
