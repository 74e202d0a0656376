"""State of a run in its checkpoints: what is written beside the model, and how a run resumes from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Annotated

import torch
from absl import logging
from annotated_types import Ge, Lt
from pydantic.dataclasses import dataclass

from generative_recommenders.build.catalogue import reads_users
from generative_recommenders.checkpoint.broadcast import shards_on_main, with_rows
from generative_recommenders.checkpoint.store import Checkpoint, CheckpointStore
from generative_recommenders.checkpoint.weights import data_tensors, load_criterion, load_model, tensors_of
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.metrics import current_name
from generative_recommenders.training.callbacks import STATE
from generative_recommenders.training.step import TABLE

if TYPE_CHECKING:
    from generative_recommenders.training.trainer import Trainer


Count = Annotated[int, Ge(0), Lt(1 << 62)]


@dataclass(config=STATE)
class Progress:
    """Where a run stands, as its checkpoints keep it. best_metric: of validation; None where none was measured.

    ValueError for what no run counts up to: a checkpoint's state may have been written by anybody.
    """

    epoch: Count = 0
    step_in_epoch: Count = 0
    step: Count = 0
    best_metric: float | None = None
    best_epoch: int | None = None
    epochs_without_gain: Count = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_targets: float = 0.0
    history: list[dict[str, bool | int | float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all({"epoch", "full"} <= record.keys() for record in self.history):
            raise ValueError("history has a record without its epoch")
        self.history = [{current_name(name): value for name, value in each.items()} for each in self.history]


def check_same_data(saved_hash: str, current_hash: str, what: str = "the prepared data") -> None:
    """Refuses to resume on data other than the run began with."""
    if saved_hash != current_hash:
        raise UserError(
            f"{what} changed since this run began (hash {saved_hash} then, {current_hash} now): "
            "restore that data set or start a new run"
        )


DATA_PARTS = {"features_hash": "features of the data", "columns_hash": "event columns of the data"}
"""Hashes of a manifest, which checkpoints since 0.2.0 hold, and what they are of."""


def check_same_part(checkpoint: Checkpoint, dataset: SequenceDataset, name: str) -> None:
    """`check_same_data` of one of `DATA_PARTS`."""
    now = getattr(dataset.manifest, name)
    check_same_data(checkpoint.state.get(name, now), now, DATA_PARTS[name])


def write_state(trainer: Trainer, store: CheckpointStore, metric: float | None, is_best: bool) -> None:
    """Model, loss, optimizer and progress as a checkpoint of the main process; shards of the table are sent to it."""
    parts = {
        "model": trainer.model.state_dict(),
        "criterion": trainer.task.criterion.state_dict(),
        "optimizer": trainer.step.optimizer.state_tensors(),
    }
    tensors = {f"{part}.{name}": x for part, named in parts.items() for name, x in named.items()}
    # The main process asks for one shard after the other while it writes, so that it never holds two.
    shards: Iterator[tuple[int, int, dict[str, torch.Tensor]]] = iter(())
    if (shard := trainer.model.items.shard) is not None:
        rows = {name: tensors.pop(name) for name in _row_tensors(trainer, tensors)}
        shards = shards_on_main(trainer.collectives, shard, rows)
        if not trainer.collectives.is_main:
            for _ in shards:
                pass
            return
    users = trainer.dataset.original_user_ids() if reads_users(trainer.model) else None
    tensors |= data_tensors(trainer.catalogue.counts, users)
    manifest = trainer.dataset.manifest
    state = {
        "progress": asdict(trainer.progress),
        "warnings": trainer.log.state(),
        "data_hash": manifest.data_hash,
        "split_hash": trainer.split.hash,
        "features_hash": manifest.features_hash,
        "columns_hash": manifest.columns_hash,
        "data": trainer.facts,
        "optimizer_tensors": len(parts["optimizer"]),
        "frozen": trainer.frozen,
        "world_size": trainer.collectives.world_size,
        "global_batch": trainer.loader.global_batch,
    }
    trainer.log.flush()  # first: a resumed run keeps the records up to its checkpoint's step, which must be there
    try:
        store.save((trainer.progress.epoch, trainer.progress.step), tensors, state, metric, is_best, shards)
    finally:
        for _ in shards:  # where the disk is full the others are still sending
            pass


def _row_tensors(trainer: Trainer, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names among a checkpoint's tensors of those that have a row for each row of the item table."""
    prefix = f"optimizer.{trainer.step.optimizer.table_prefix}"
    return [TABLE, *(name for name, x in tensors.items() if name.startswith(prefix) and x.dim() > 0)]


def restore_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Continues from a checkpoint: refused on other data; a warning at another number of processes. What was recorded
    after it stays, for the caller to remove."""
    try:
        split_hash = checkpoint.state["split_hash"]
        processes, batch = (checkpoint.state[name] for name in ("world_size", "global_batch"))
        if not all(type(count) is int and 0 < count < 1 << 31 for count in (processes, batch)):
            raise ValueError(f"world_size is {processes!r}, global_batch {batch!r}")
        progress = Progress(**checkpoint.state["progress"])
        trainer.log.restore(checkpoint.state["warnings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path} does not hold the state of a run: {error!r}") from error
    _check_same_run(trainer, checkpoint, split_hash)
    by_rows = {*_row_tensors(trainer, checkpoint.tensors), *checkpoint.row_shapes}
    checkpoint = with_rows(trainer.collectives, checkpoint, by_rows, trainer.model.items.shard)
    load_model(trainer.model, checkpoint)
    load_criterion(trainer.task.criterion, checkpoint)
    moments = tensors_of(checkpoint, "optimizer")
    # Releases before 0.2.0 did not count them, and had no optimizer without a state.
    written = checkpoint.state.get("optimizer_tensors", max(len(moments), min(progress.step, 1)))
    if len(moments) != written:
        raise UserError(f"{checkpoint.path} lacks optimizer state: it can be evaluated, not resumed")
    trainer.step.optimizer.load_state_tensors(moments)
    if processes != trainer.collectives.world_size and not trainer.settings.schedule.deterministic:
        logging.warning(
            "resuming a run of %d processes on %d: dropout draws differ",
            processes, trainer.collectives.world_size,
        )  # fmt: skip
    progress.step_in_epoch = _place_in_epoch(trainer, progress.step_in_epoch, batch)
    trainer.progress = progress
    # 0 in a run that nothing changed. Where an epoch has other steps than before, its place counts, not its steps.
    place = progress.epoch * len(trainer.loader) + progress.step_in_epoch
    trainer.step.optimizer.cosine_shift = place - progress.step


def _check_same_run(trainer: Trainer, checkpoint: Checkpoint, split_hash: str) -> None:
    """UserError where the checkpoint is of other data, another split or other frozen parameters."""
    manifest, protocol = trainer.dataset.manifest, trainer.settings.data.protocol
    if split_hash != trainer.split.hash and checkpoint.state.get("data_hash") == manifest.data_hash:
        raise UserError(
            f"train_fn.protocol = {protocol!r} splits the data otherwise than when this run began "
            f"(hash {split_hash} then, {trainer.split.hash} now): keep the protocol or start a new run"
        )
    check_same_data(split_hash, trainer.split.hash)
    for name in DATA_PARTS:
        check_same_part(checkpoint, trainer.dataset, name)
    if checkpoint.state.get("frozen", []) != trainer.frozen:
        raise UserError(
            "train_fn.freeze holds other parameters than when this run began: keep it, or start a new run with "
            "train_fn.initialize_from"
        )


def _place_in_epoch(trainer: Trainer, steps: int, batch: int) -> int:
    """Steps of this run's global batch that stand for ``steps`` of a batch of ``batch`` users."""
    length, now = len(trainer.loader), trainer.loader.global_batch
    if batch != now:
        # Those that cover the users of the steps done, and no more: the place in an epoch is one of users.
        users = trainer.loader.users.size
        done = min(steps * batch, users)
        steps = length if done == users else done // now
        logging.warning(
            "resuming with a global batch of %d users, which was %d: after %d users of the epoch, "
            "%d of them are seen again",
            now, batch, done, done - min(steps * now, users),
        )  # fmt: skip
    return min(steps, length)  # an epoch has fewer steps than when it began where other training_windows were chosen
