"""Checkpoints: folders of safetensors, JSON and Parquet that appear whole or not at all.

::

    checkpoints/
      000007-epoch-3-step-1200/          serial number, then the position
        manifest.json                    version, position, metric; bytes and sha256 of the other files
        rows-1-of-2.safetensors  ...     a sharded item table and its optimizer state, the rows of one process in each
        tensors.safetensors  state.json  the training state
        item_ids.parquet  settings.json  resolved.gin      what a model is rebuilt from: a folder loads alone
      damaged-000006-epoch-2-step-800/   failed a checksum and was set aside; no longer counted or removed

A checkpoint is written under a hidden temporary name, flushed to the disk and renamed. Checkpoints share no
file, so that one damaged file costs one checkpoint. Serial numbers only grow, so "newest" needs no clock.
Reading one executes no code: no pickle, no gin.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import torch
from absl import logging

from generative_recommenders.checkpoint.files import (
    ITEM_IDS,
    RESOLVED_GIN,
    SETTINGS,
    STATE,
    TENSORS,
    DamagedCheckpoint,
    Manifest,
    RowFiles,
    item_id_bytes,
    json_bytes,
    read_item_ids,
    read_json,
    read_manifest,
    read_tensors,
    sync,
    write_bytes,
    write_manifest,
    write_tensors,
)
from generative_recommenders.errors import UserError, first_line

_NAME = re.compile(r"(\d{6,})-epoch-\d+-step-\d+")
_WRITING, _REMOVED, _DAMAGED = ".writing-", ".removed-", "damaged-"


T = TypeVar("T")


class Position(NamedTuple):
    """Where a run stands: whole epochs done and optimizer steps done since the start of the run."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """One validated checkpoint. tensors are on the CPU; metric is None where none was measured.

    row_shapes: dtypes and shapes of tensors that lie in files by rows and are not among ``tensors``; rows: their files,
    where this process sees them.
    """

    path: Path
    position: Position
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    metric: float | None
    is_best: bool
    row_shapes: Mapping[str, tuple[torch.dtype, list[int]]] = field(default_factory=dict)
    rows: RowFiles | None = None

    def item_ids(self) -> pa.Array:
        """Original ids ``[V]`` as strings: row i is internal id i + 1."""
        return read_item_ids(self.path / ITEM_IDS)

    def settings(self) -> dict[str, Any]:
        """The closed settings that the model is rebuilt from."""
        return read_json(self.path / SETTINGS)


class CheckpointStore:
    """The checkpoints of one run.

    folder: created if need be. keep_last: how many of the newest are kept; the best one is kept besides.
    read_only: for evaluation beside a running training: nothing is created, renamed or removed. Only one
    process may write to a folder. joins_rows: whether ``tensors`` of a checkpoint hold the whole of what lies in files
    by rows.
    """

    def __init__(
        self, folder: Path | str, keep_last: int = 3, read_only: bool = False, joins_rows: bool = True
    ) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.read_only = read_only
        self.joins_rows = joins_rows
        self.attached: dict[str, bytes] = {}
        if read_only:
            return
        with self._writable():
            if self.folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link, and checkpoints are written to no folder elsewhere: remove it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            for entry in self.folder.iterdir():
                if entry.name.startswith((_WRITING, _REMOVED)):  # of a writer that was killed
                    shutil.rmtree(entry, ignore_errors=True)

    def attach(self, item_ids: pa.Array, settings: Mapping[str, Any], resolved_gin: str) -> None:
        """Attaches to every later checkpoint, so that it loads alone: original item ids ``[V]`` (strings), settings and
        resolved gin text. Earlier ones keep what they were saved with."""
        self.attached = {
            ITEM_IDS: item_id_bytes(item_ids),
            SETTINGS: json_bytes(settings),
            RESOLVED_GIN: resolved_gin.encode(),
        }

    def save(
        self,
        position: tuple[int, int],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        metric: float | None = None,
        is_best: bool = False,
        shards: Iterable[tuple[int, int, Mapping[str, torch.Tensor]]] = (),
    ) -> Path:
        """Writes a checkpoint and removes those that are no longer kept; returns its folder.

        tensors: any dtypes and devices, storage may be shared. state: JSON values. shards: first row, end and tensors
        of each shard, from row 0 on, which are written one after the other. Raises UserError where
        the disk is full or not writable; then nothing of it is left and older checkpoints are whole.
        """
        epoch, step = (int(count) for count in position)
        with self._writable():
            # one more than any checkpoint has, also than those set aside
            names = (name.removeprefix(_DAMAGED) for name in self._folders())
            serial = max((_serial(name) for name in names if _NAME.fullmatch(name)), default=0) + 1
            final = self.folder / f"{serial:06d}-epoch-{epoch}-step-{step}"
            writing = self.folder / f"{_WRITING}{final.name}"
            try:
                writing.mkdir()
                write_tensors(writing / TENSORS, tensors)
                for name, content in {STATE: json_bytes(state), **self.attached}.items():
                    write_bytes(writing / name, content)
                written = []  # how many there are, which their names say, is known after the last one
                for first, stop, rows in shards:
                    written.append([first, stop])
                    write_tensors(writing / f"rows-{len(written)}.safetensors", rows)
                row_files = {}
                for number, bounds in enumerate(written, start=1):
                    name = f"rows-{number}-of-{len(written)}.safetensors"
                    os.rename(writing / f"rows-{number}.safetensors", writing / name)
                    row_files[name] = bounds
                manifest = Manifest(epoch=epoch, step=step, metric=metric, is_best=is_best, row_files=row_files)
                write_manifest(writing, manifest)
                sync(writing)
                # Only now it has a checkpoint's name: whoever reads the folder meanwhile sees whole ones alone.
                os.rename(writing, final)
                sync(self.folder)
            finally:
                shutil.rmtree(writing, ignore_errors=True)
            best = self.best_path()
            for name in self._names()[: -self.keep_last]:
                if best is None or name != best.name:
                    removed = self.folder / f"{_REMOVED}{name}"
                    # A kill amid the removal leaves no half checkpoint.
                    os.rename(self.folder / name, removed)
                    shutil.rmtree(removed, ignore_errors=True)
        return final

    def load(self, path: Path | str) -> Checkpoint:
        """The checkpoint in the folder ``path``, every byte compared with its checksum.

        Raises DamagedCheckpoint (a UserError) where a checksum fails, UserError where it cannot be read or its version
        is not known.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        tensors, rows = read_tensors(folder / TENSORS), None
        if manifest.row_files:
            rows = RowFiles(folder, manifest.row_files)
            if self.joins_rows:
                tensors |= {name: rows.read(name, 0, shape[0]) for name, (_, shape) in rows.shapes.items()}
                rows = None
        return Checkpoint(
            folder, Position(manifest.epoch, manifest.step), tensors, read_json(folder / STATE),
            manifest.metric, manifest.is_best, {} if rows is None else rows.shapes, rows,
        )  # fmt: skip

    def load_newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. Damaged ones that are newer are set aside with a warning each."""
        return self._first_whole(self._names()[::-1], self.load)

    def newest_settings(self) -> dict[str, Any] | None:
        """The settings of the newest checkpoint that has them whole, or None; its tensors are not read."""

        def read(folder: Path) -> dict[str, Any]:
            read_manifest(folder, {SETTINGS})
            return read_json(folder / SETTINGS)

        return self._first_whole(self._names()[::-1], read)

    def load_best(self) -> Checkpoint | None:
        """The last checkpoint that was saved as the best, or None; damaged ones are set aside with a warning."""
        return self._first_whole([name for name in self._names()[::-1] if self._is_best(name)], self.load)

    def best_path(self) -> Path | None:
        """Folder of the last checkpoint that was saved as the best, not validated, or None."""
        return next((path for path in self.paths()[::-1] if self._is_best(path.name)), None)

    def load_best_or_newest(self) -> Checkpoint | None:
        """The best checkpoint, or the newest where none was saved as the best."""
        # twice: a run that goes on may replace its best one meanwhile
        return self.load_best() or self.load_best() or self.load_newest()

    def paths(self) -> list[Path]:
        """Folders of all checkpoints, oldest first, not validated."""
        return [self.folder / name for name in self._names()]

    def _folders(self) -> list[str]:
        try:
            entries = [entry for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror}") from error
        return [entry.name for entry in entries]

    def _names(self) -> list[str]:
        return sorted(filter(_NAME.fullmatch, self._folders()), key=_serial)

    def _first_whole(self, names: list[str], read: Callable[[Path], T]) -> T | None:
        for name in names:
            try:
                return read(self.folder / name)
            except DamagedCheckpoint as error:
                message = f"{error}; the checkpoint before it is used"
            if not self.read_only:  # so that it is neither the best nor one of those kept
                with contextlib.suppress(OSError):
                    os.rename(self.folder / name, self.folder / f"{_DAMAGED}{name}")
                    sync(self.folder)
                    message += f", it is set aside as {_DAMAGED}{name}"
            logging.warning("%s", message)
        return None

    def _is_best(self, name: str) -> bool:
        try:
            return read_manifest(self.folder / name, checked=()).is_best
        except DamagedCheckpoint:
            return False

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise UserError(
                f"could not write a checkpoint to {self.folder}: {reason}; older checkpoints are whole"
            ) from error


def checkpoint_of_run(run: Path | str) -> Checkpoint:
    """The best checkpoint of a run's folder, else the newest; UserError for a folder that is no run's, or that has no
    whole checkpoint."""
    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is no folder of a run: it has no checkpoints")
    checkpoint = CheckpointStore(folder, read_only=True).load_best_or_newest()
    if checkpoint is None:
        raise UserError(f"there is no whole checkpoint in {folder}")
    return checkpoint


def _serial(name: str) -> int:
    return int(name.split("-", maxsplit=1)[0])
