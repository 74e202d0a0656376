"""Data module over a prepared folder: main.py's batches under Lightning's trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch

from generative_recommenders.build.parts import Catalogue
from generative_recommenders.build.registered import build_part
from generative_recommenders.config.registry import SEEN_FILTERS
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import (
    EvaluationLoader,
    Histories,
    LoadedBatch,
    SequenceLoader,
    SequenceRows,
)
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.evaluation import seen_filters  # noqa: F401  (register)


class DataModule(lightning.LightningDataModule):
    """The batches that main.py makes of a prepared folder under the same settings.

    Training batches are `LoadedBatch`. The others are mappings: "history", the columns that a model reads; "query_id" ``[B]``;
    "ground_truth" ``[B, 1]``, -1 where the target is a miss whatever its score; "seen_ids" and "train" ``[B, S]``, what the
    seen filter removes and what the user had, padded with -1. Ids are those of the prepared data, users and items from 1.

    settings: of main.py; defaults unless given. A ``compat`` SeenItemsFilter of ``item_count`` V + 1 removes "seen_ids".
    """

    def __init__(self, folder: str | Path, settings: RunSettings | None = None) -> None:
        super().__init__()
        self.folder, self.settings = Path(folder), settings or RunSettings()

    @cached_property
    def dataset(self) -> SequenceDataset:
        return SequenceDataset.open(self.folder)

    @cached_property
    def split(self) -> Split:
        return make_split(self.dataset, self.settings.data.protocol)

    def catalogue(self) -> Catalogue:
        """What ``build_task(settings, catalogue)`` asks for."""
        return Catalogue.of(self.dataset, self.split.train_stops, self.settings.items.category_feature)

    def train_dataloader(self) -> Any:
        data, schedule, trainer = self.settings.data, self.settings.schedule, self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        loader = SequenceLoader(
            self.dataset, self.split.train_stops, data.max_sequence_length, schedule.local_batch_size,
            schedule.random_seed, data.positional_sampling_ratio, rank, world, data.training_windows,
        )  # fmt: skip
        return _Epochs(loader, trainer)

    def val_dataloader(self) -> Any:
        """The validation targets; in protocol "paper" there are none and the test targets are taken."""
        if self.settings.data.protocol == "paper":
            return self.test_dataloader()
        return _Targets(self, self.split.validation_targets, self.split.unseen_validation_targets)

    def test_dataloader(self) -> Any:
        return _Targets(self, self.split.test_targets, self.split.unseen_test_targets)

    def predict_dataloader(self) -> Any:
        return _WholeHistories(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A task draws on the CPU for a batch, which it then moves itself."""
        if isinstance(batch, LoadedBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def original_ids(
        self, frame: pd.DataFrame, query_column: str = "query_id", item_column: str = "item_id"
    ) -> pd.DataFrame:
        """A callback's result with the ids of the raw data."""
        users = self.dataset.original_user_ids().combine_chunks()
        items = self.dataset.original_item_ids().combine_chunks()
        return frame.assign(
            **{
                query_column: users.take(frame[query_column].to_numpy() - 1).to_pandas().to_numpy(),
                item_column: items.take(frame[item_column].to_numpy() - 1).to_pandas().to_numpy(),
            }
        )


class _Epochs:
    """Training batches of the trainer's current epoch."""

    def __init__(self, loader: SequenceLoader, trainer: lightning.Trainer | None) -> None:
        self.loader, self.trainer = loader, trainer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self.loader.epoch(self.trainer.current_epoch if self.trainer is not None else 0)


class _Targets:
    """Histories before a target, with it and with what is removed from the ranking."""

    def __init__(self, module: DataModule, targets: np.ndarray, unseen: np.ndarray) -> None:
        data, evaluation, trainer = module.settings.data, module.settings.evaluation, module.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        batch_size = min(
            evaluation.eval_batch_size, evaluation.eval_user_max_batch_size or evaluation.eval_batch_size
        )
        self.loader = EvaluationLoader(module.dataset, targets, data.max_sequence_length, batch_size)
        # Users, not batches, are dealt to the processes: Lightning's hooks wait for one that had no batch.
        self.loader.users = self.loader.users[rank::world]
        self.filter = build_part(module.settings, SEEN_FILTERS, evaluation.seen_filter, {})
        # In protocol "paper" targets that training never saw rank as they are scored.
        self.missed = np.zeros_like(unseen) if data.protocol == "paper" else unseen

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for columns in self.loader:
            users = columns["user_ids"].numpy() - 1
            histories = self.loader.histories(users)
            none = torch.zeros(0, dtype=torch.int64)
            rows, ids = self.filter.removed(columns, histories) or (none, none)
            missed = torch.from_numpy(self.missed[users])
            yield {
                "history": columns,
                "query_id": columns["user_ids"],
                "ground_truth": columns["target_ids"].masked_fill(missed, -1)[:, None],
                "seen_ids": _rectangle(rows, ids, len(users)),
                "train": _rectangle(histories.rows, histories["item_ids"], len(users)),
            }


class _WholeHistories:
    """All events of every user, for recommendations of what comes next."""

    def __init__(self, module: DataModule) -> None:
        settings, trainer = module.settings, module.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        self.dataset, self.batch_size = module.dataset, settings.evaluation.eval_batch_size
        self.rows = SequenceRows(module.dataset, settings.data.max_sequence_length)
        self.users = np.arange(module.dataset.num_users)[rank::world]

    def __len__(self) -> int:
        return math.ceil(len(self.users) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.users), self.batch_size):
            users = self.users[start : start + self.batch_size]
            stops = np.asarray(self.dataset.lengths[users], dtype=np.int64)
            columns = self.rows.cut(users, np.zeros_like(stops), stops)
            histories = Histories(self.dataset, users, stops)
            seen = _rectangle(histories.rows, histories["item_ids"], len(users))
            yield {"history": columns, "query_id": columns["user_ids"], "seen_ids": seen, "train": seen}


def _rectangle(rows: torch.Tensor, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Pairs of row and id as ``[num_rows, S]``, padded with -1."""
    order = rows.argsort(stable=True)
    rows, ids = rows[order], ids[order]
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    out = torch.full((num_rows, int(counts.max()) if len(counts) else 0), -1, dtype=torch.int64)
    out[rows, torch.arange(len(rows)) - starts[rows]] = ids
    return out
