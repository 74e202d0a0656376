"""Data module over a prepared folder: main.py's batches under Lightning's trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
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
    query_histories,
)
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.evaluation.model_evaluation import evaluation_batch_size, measured_targets
from generative_recommenders.evaluation.seen_filters import SeenItems
from generative_recommenders.lightning.parquet import place_of

Frame = TypeVar("Frame", pd.DataFrame, pl.DataFrame)


class DataModule(lightning.LightningDataModule):
    """The batches that main.py makes of a prepared folder under the same settings.

    Training batches are `LoadedBatch`. The others are mappings: "history", the columns that a model reads; "query_id"
    ``[B]``; "ground_truth" ``[B, 1]``, -1 where the target is a miss whatever its score; "seen_ids" and "train"
    ``[B, S]``, what the seen filter removes and what the user had, padded with -1. Ids are those of the prepared data,
    users and items from 1.

    settings: of main.py; defaults unless given. A ``compat`` SeenItemsFilter of ``item_count`` V + 1 removes
    "seen_ids".
    """

    def __init__(self, folder: str | Path, settings: RunSettings | None = None) -> None:
        super().__init__()
        self.folder, self.settings = Path(folder), settings or RunSettings()

    @cached_property
    def dataset(self) -> SequenceDataset:
        return SequenceDataset.open(self.folder).with_catalogue(self.settings.data.catalogue)

    @cached_property
    def split(self) -> Split:
        return make_split(self.dataset, self.settings.data.protocol)

    def catalogue(self) -> Catalogue:
        """Arguments of ``build_task(settings, catalogue)``."""
        return Catalogue.of(self.dataset, self.split.train_stops, self.settings.items.category_feature)

    def train_dataloader(self) -> Any:
        data, schedule = self.settings.data, self.settings.schedule
        loader = SequenceLoader(
            self.dataset, self.split.train_stops, data.max_sequence_length, schedule.local_batch_size,
            schedule.random_seed, data.positional_sampling_ratio, *place_of(self.trainer), data.training_windows,
        )  # fmt: skip
        return _TrainingBatches(loader, self.trainer)

    def val_dataloader(self) -> Any:
        """The validation targets; in protocol "paper" there are none and the test targets are taken."""
        if self.settings.data.protocol == "paper":
            return self.test_dataloader()
        return self._targets("validation")

    def test_dataloader(self) -> Any:
        return self._targets("test")

    def predict_dataloader(self) -> Any:
        """All events of every user, for recommendations of what comes next, as of ``--mode=predict``."""
        rank, world = place_of(self.trainer)
        size = self.settings.evaluation.eval_batch_size
        width = self.settings.data.max_sequence_length
        mine = np.arange(self.dataset.num_users)[rank::world]

        def batches() -> Iterator[dict[str, Any]]:
            for users in (mine[start : start + size] for start in range(0, len(mine), size)):
                stops = np.asarray(self.dataset.lengths[users], dtype=np.int64)
                columns = query_histories(self.dataset, users, stops, width)
                histories = Histories(self.dataset, users, stops)
                seen = self._rectangle(histories.rows, histories["item_ids"], len(users))
                yield {"history": columns, "query_id": columns["user_ids"], "seen_ids": seen, "train": seen}

        return _Batches(math.ceil(len(mine) / size), batches)

    def _targets(self, part: str) -> _Batches:
        """Histories before a target, with it and with what is removed from the ranking."""
        settings, (rank, world) = self.settings, place_of(self.trainer)
        targets, missed = measured_targets(settings, self.split, part)
        # Users, not batches, are dealt to the processes: Lightning's hooks would wait for one without a batch.
        mine = np.flatnonzero(targets >= 0)[rank::world]
        size = evaluation_batch_size(settings)
        loader = EvaluationLoader(self.dataset, targets, settings.data.max_sequence_length, size, users=mine)
        seen_filter = build_part(settings, SEEN_FILTERS, settings.evaluation.seen_filter, {})

        def batches() -> Iterator[dict[str, Any]]:
            for columns in loader:
                users = columns["user_ids"].numpy() - 1
                histories = loader.histories(users)
                none = torch.zeros(0, dtype=torch.int64)
                rows, ids = seen_filter.removed(columns, histories) or (none, none)
                absent = torch.from_numpy(missed[users])
                yield {
                    "history": columns,
                    "query_id": columns["user_ids"],
                    "ground_truth": columns["target_ids"].masked_fill(absent, -1)[:, None],
                    "seen_ids": self._rectangle(rows, ids, len(users)),
                    "train": self._rectangle(histories.rows, histories["item_ids"], len(users)),
                }

        return _Batches(len(loader), batches)

    def _rectangle(self, rows: torch.Tensor, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Pairs of row and id as ``[num_rows, S]``, each once, padded with -1."""
        padded = SeenItems.of(rows, ids, self.dataset.num_items).rectangle(num_rows)
        return padded.masked_fill(padded == 0, -1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves training batches alone: a task draws for them on the CPU and then moves them itself."""
        if isinstance(batch, LoadedBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def original_ids(self, frame: Frame, query_column: str = "query_id", item_column: str = "item_id") -> Frame:
        """The frame of a pandas or polars callback with the ids of the raw data."""
        kept = ((query_column, self.dataset.original_user_ids()), (item_column, self.dataset.original_item_ids()))
        named = {name: ids.combine_chunks().take(pa.array(frame[name].to_numpy() - 1)) for name, ids in kept}
        if isinstance(frame, pl.DataFrame):
            return frame.with_columns(**{name: pl.Series(pl.from_arrow(ids)) for name, ids in named.items()})
        return frame.assign(**{name: ids.to_pandas().to_numpy() for name, ids in named.items()})


class _Batches:
    """A known number of batches, made anew in each pass."""

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self.length, self.batches = length, batches

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


class _TrainingBatches:
    """The batches of the trainer's epoch, from its step on: a fit that resumes goes on where it was, as main.py does.

    Lightning takes its iterator before it says which epoch is resumed, so that is asked for with the first batch.
    """

    def __init__(self, loader: SequenceLoader, trainer: lightning.Trainer | None) -> None:
        self.loader, self.trainer = loader, trainer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LoadedBatch]:
        if self.trainer is None:
            yield from self.loader.epoch(0)
        else:
            # After a fit its last step is still there, and a loader that somebody asks for then is a whole one.
            first = self.trainer.fit_loop.batch_idx + 1 if self.trainer.training else 0
            yield from self.loader.epoch(self.trainer.current_epoch, first)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer keeps its epoch and step. Lightning knows by this method what can resume in an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
