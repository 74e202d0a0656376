"""Data module over Parquet tables: columns as left-padded tensors with masks, transformed on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import numpy as np
import pyarrow as pa
import torch

from generative_recommenders.data.list_columns import padded, read_columns, require_columns
from generative_recommenders.data.loader import Histories
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

SPLITS = ("train", "validate", "test", "predict")
Source: TypeAlias = "str | Path | pa.Table"
Metadata = Mapping[str, Mapping[str, Any]]


class ParquetModule(lightning.LightningDataModule):
    """Batches of Parquet tables whose columns hold numbers or lists of numbers, one row a query.

    A batch has each column of the metadata and, beside it, ``NAME_mask``, True where a value is real: a number gives
    ``[B]``, a list ``[B, shape]`` with its last entries on the right and padding on their left. Training rows are
    shuffled anew each epoch, by torch's seed.

    metadata: by split, then by column: ``{"shape": 50, "padding": 0}`` for lists (``[50, 3]`` for lists of lists;
        ``padding_value`` is read too), ``{}`` for numbers. A split that is missing takes that of "train".
    transforms: by split, modules from one batch to the next; they are moved to the device and applied there.
    config: ``{"train": {"generator": ...}}`` shuffles by a torch generator instead.
    *_path: a file or a folder of files; a list of them for validation, test and prediction gives several loaders.
    prepared_folder: a prepared data set that the splits without a path are read from, as columns ``query_id``,
        ``item_id`` (ids from 0), ``timestamp`` and ``rating`` where it has them, ``train`` (what the user had) and, for
        validation and test, ``ground_truth``. protocol: its split.
    "validation" is read as "validate" in metadata and transforms.
    """

    def __init__(
        self,
        batch_size: int,
        metadata: Mapping[str, Metadata],
        transforms: Mapping[str, Sequence[torch.nn.Module]],
        config: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        train_path: str | Path | None = None,
        validate_path: str | Path | Sequence[str | Path] | None = None,
        test_path: str | Path | Sequence[str | Path] | None = None,
        predict_path: str | Path | Sequence[str | Path] | None = None,
        prepared_folder: str | Path | None = None,
        protocol: str = "leave_one_out",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"ParquetModule: batch_size must be 1 or more, not {batch_size}")
        self.batch_size, self.config = batch_size, dict(config or {})
        self.metadata, self.transforms = _by_split(metadata, "metadata"), {}
        for split, modules in _by_split(transforms, "transforms").items():
            self.transforms[split] = torch.nn.Sequential(*modules)
        given: dict[str, Any] = dict(zip(SPLITS, (train_path, validate_path, test_path, predict_path)))
        self._sources: dict[str, list[Source]] = {
            split: [path] if isinstance(path, str | Path) else list(path)
            for split, path in given.items()
            if path is not None
        }
        self.prepared_folder, self.protocol = prepared_folder, protocol
        if not self._sources and prepared_folder is None:
            raise UserError("ParquetModule: give at least one of the paths, or prepared_folder")

    @cached_property
    def _prepared(self) -> tuple[SequenceDataset, Split]:
        assert self.prepared_folder is not None
        dataset = SequenceDataset.open(self.prepared_folder)
        return dataset, make_split(dataset, self.protocol)

    def _sources_of(self, split: str) -> list[Source]:
        """What a split is read from; a table of the prepared folder is made on first use."""
        if split not in self._sources and self.prepared_folder is not None:
            self._sources[split] = [prepared_table(*self._prepared, split)]
        return self._sources.get(split, [])

    def train_dataloader(self) -> Any:
        if (given := len(self._sources_of("train"))) != 1:
            raise UserError(f"ParquetModule: training reads one train_path, and {given} are given")
        return self._loaders("train")[0]

    def val_dataloader(self) -> Any:
        return self._loaders("validate")

    def test_dataloader(self) -> Any:
        return self._loaders("test")

    def predict_dataloader(self) -> Any:
        return self._loaders("predict")

    def _loaders(self, split: str) -> list[ParquetBatches]:
        metadata = self.metadata.get(split) or self.metadata.get("train")
        if metadata is None:
            raise UserError(f"ParquetModule: metadata has no columns for {split!r}")
        generator = self.config.get(split, {}).get("generator")
        return [
            ParquetBatches(source, metadata, self.batch_size, split == "train", generator, self.trainer)
            for source in self._sources_of(split)
        ]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The transforms of the stage, on the batch's device."""
        assert self.trainer is not None  # called by it
        stage = str(getattr(self.trainer.state.stage, "value", ""))
        split = "validate" if stage == "sanity_check" else stage
        if split not in self.transforms:
            return batch
        device = next((x.device for x in batch.values() if isinstance(x, torch.Tensor)), None)
        return self.transforms[split].to(device)(batch)


class ParquetBatches:
    """The batches of one table; a new pass over it is a new epoch. trainer: tells the epoch and this process's
    place."""

    def __init__(
        self,
        source: Source,
        metadata: Metadata,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None = None,
        trainer: lightning.Trainer | None = None,
    ) -> None:
        self.metadata, self.batch_size, self.shuffle = metadata, batch_size, shuffle
        self.generator, self.trainer = generator, trainer
        self.name = source if isinstance(source, str | Path) else "the prepared folder"
        table = source if isinstance(source, pa.Table) else read_columns(Path(source), list(metadata))
        require_columns(table.column_names, list(metadata), self.name)
        # With several chunks, `take` would join them all again for each batch.
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        rank, world = place_of(self.trainer)
        rows = self.table.num_rows
        mine = rows // world if self.shuffle else len(range(rank, rows, world))
        return math.ceil(mine / self.batch_size)

    def _rows(self, epoch: int) -> np.ndarray:
        """This process's rows, in the order of the epoch; all processes have equally many to train on."""
        rows = np.arange(self.table.num_rows)
        rank, world = place_of(self.trainer)
        if self.shuffle:
            generator = self.generator or torch.Generator().manual_seed((torch.initial_seed() + epoch) % 2**63)
            # The processes deal out one order, so torch's seed has to be the same in all (`seed_everything`).
            rows = torch.randperm(len(rows), generator=generator).numpy()
            # A process with one more batch would wait forever for the others' gradients.
            rows = rows[: len(rows) // world * world]
        return rows[rank::world]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = self._rows(self.trainer.current_epoch if self.trainer is not None else 0)
        for start in range(0, len(rows), self.batch_size):
            part = self.table.take(pa.array(rows[start : start + self.batch_size]))
            batch: dict[str, torch.Tensor] = {}
            for name, settings in self.metadata.items():
                shape = settings.get("shape", ())
                shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
                padding = settings.get("padding", settings.get("padding_value", 0))
                try:
                    values, mask = padded(part[name].combine_chunks(), shape, padding)
                except (TypeError, ValueError, pa.ArrowException) as error:
                    raise UserError(f"column {name!r} of {self.name}: {error}") from error
                batch[name], batch[f"{name}_mask"] = torch.from_numpy(values), torch.from_numpy(mask)
            yield batch


def place_of(trainer: lightning.Trainer | None) -> tuple[int, int]:
    """Rank of this process and the number of processes."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def prepared_tables(dataset: SequenceDataset, protocol: str) -> dict[str, pa.Table]:
    """A prepared data set by split, as `ParquetModule` reads tables."""
    split = make_split(dataset, protocol)
    return {name: prepared_table(dataset, split, name) for name in SPLITS}


def prepared_table(dataset: SequenceDataset, split: Split, name: str) -> pa.Table:
    """The table of one of `SPLITS`."""
    users, stops, targets = np.arange(dataset.num_users), np.asarray(dataset.lengths), None
    if name == "train":
        users = np.flatnonzero(split.train_stops >= 2)
        stops = split.train_stops[users]
    elif name != "predict":
        targets = split.validation_targets if name == "validate" else split.test_targets
        users = np.flatnonzero(targets >= 0)
        stops = targets = targets[users]
    histories = Histories(dataset, users, stops.astype(np.int64))
    bounds = np.concatenate([[0], np.cumsum(histories.stops)])
    columns = {"query_id": pa.array(users.astype(np.int64))}
    for column, source in (("item_id", "item_ids"), ("timestamp", "timestamps"), ("rating", "ratings")):
        if source != "item_ids" and getattr(dataset, source) is None:
            continue
        values = histories[source].numpy() - (source == "item_ids")  # ids from 0 here
        columns[column] = pa.LargeListArray.from_arrays(bounds, pa.array(values))
    columns["train"] = columns["item_id"]
    if targets is not None:
        wanted = np.asarray(dataset.items)[dataset.offsets[users] + targets].astype(np.int64) - 1
        columns["ground_truth"] = pa.LargeListArray.from_arrays(np.arange(len(users) + 1), pa.array(wanted))
    return pa.table(columns)


def _by_split(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """By Lightning's names of the splits; UserError for others."""
    renamed = {"validate" if split == "validation" else split: value for split, value in given.items()}
    unknown = [split for split in renamed if split not in SPLITS]
    if unknown:
        raise UserError(f"ParquetModule: {what} of {unknown[0]!r}: the splits are {', '.join(SPLITS)}")
    return renamed
