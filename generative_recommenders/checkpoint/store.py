"""Checkpoints: folders of safetensors, JSON and Parquet that appear whole or not at all.

::

    checkpoints/
      attached/                          item_ids.parquet, settings.json, resolved.gin: written once
      000007-epoch-3-step-1200/          serial number, then the position
        manifest.json                    version, position, metric; bytes and sha256 of the other files
        tensors.safetensors  state.json  the training state
        item_ids.parquet  settings.json  resolved.gin      copies of attached/: a folder loads alone
      damaged-000006-epoch-2-step-800/   found damaged and set aside; no longer counted or removed

A checkpoint is written under a hidden temporary name, flushed to the disk and renamed. Checkpoints share no
file, so that one damaged file costs one checkpoint. Serial numbers only grow, so "newest" needs no clock.
Reading one executes no code: no pickle, no gin.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from absl import logging

from generative_recommenders.checkpoint.files import (
    ATTACHED,
    STATE,
    TENSORS,
    DamagedCheckpoint,
    Manifest,
    read_item_ids,
    read_json,
    read_manifest,
    read_tensors,
    read_text,
    sync,
    write_failed,
    write_item_ids,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)
from generative_recommenders.errors import UserError

_NAME = re.compile(r"(\d{6,})-epoch-\d+-step-\d+")
_WRITING, _REMOVED, _DAMAGED = ".writing-", ".removed-", "damaged-"


class Position(NamedTuple):
    """Where a run stands: whole epochs done and optimizer steps done since the start of the run."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """One validated checkpoint. tensors are on the CPU; metric is None where none was measured."""

    path: Path
    position: Position
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    metric: float | None
    is_best: bool

    def item_ids(self) -> pa.Array:
        """Original ids ``[V]`` as strings: row i is internal id i + 1."""
        return read_item_ids(self.path)

    def settings(self) -> dict[str, Any]:
        """The closed settings that the model is rebuilt from."""
        return read_json(self.path / "settings.json")

    def resolved_gin(self) -> str:
        """The run's configuration as text, for people to read."""
        return read_text(self.path / "resolved.gin")


class CheckpointStore:
    """The checkpoints of one run.

    folder: created if need be. keep_last: how many of the newest are kept; the best one is kept besides.
    read_only: for evaluation beside a running training: nothing is created, renamed or removed. Only one
    process may write to a folder.
    """

    def __init__(self, folder: Path | str, keep_last: int = 3, read_only: bool = False) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.read_only = read_only
        if not read_only:
            self._prepare_folder()

    def attach(self, item_ids: pa.Array, settings: Mapping[str, Any], resolved_gin: str) -> None:
        """Writes what every later checkpoint carries: original item ids ``[V]`` (strings), settings,
        resolved gin text.

        A resumed run attaches its own again; older checkpoints keep what they were saved with.
        """
        writing = self.folder / f"{_WRITING}attached"
        attached = self.folder / "attached"
        try:
            _remove(writing)
            writing.mkdir()
            write_item_ids(writing, item_ids)
            write_json(writing / "settings.json", dict(settings))
            write_text(writing / "resolved.gin", resolved_gin)
            _remove(attached)
            os.rename(writing, attached)
            sync(self.folder)
        except OSError as error:
            raise write_failed(self.folder, error) from error

    def save(
        self,
        position: tuple[int, int],
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        metric: float | None = None,
        is_best: bool = False,
    ) -> Path:
        """Writes a checkpoint and removes those that are no longer kept; returns its folder.

        tensors: any dtypes and devices, storage may be shared. state: JSON values. Raises UserError where
        the disk is full or not writable; then nothing of it is left and older checkpoints are whole.
        """
        serial = self._next_serial()
        epoch, step = (int(count) for count in position)
        final = self.folder / f"{serial:06d}-epoch-{epoch}-step-{step}"
        writing = self.folder / f"{_WRITING}{final.name}"
        try:
            writing.mkdir()
            write_tensors(writing / TENSORS, tensors)
            write_json(writing / STATE, dict(state))
            self._copy_attached(writing)
            write_manifest(writing, Manifest(epoch, step, metric, is_best))
            sync(writing)
            os.rename(writing, final)
            sync(self.folder)
            self._prune()
        except OSError as error:
            raise write_failed(self.folder, error) from error
        finally:
            _remove(writing)
        return final

    def load(self, path: Path | str) -> Checkpoint:
        """The checkpoint in the folder ``path``, every byte compared with its checksum.

        Raises DamagedCheckpoint (a UserError) where it is damaged, UserError where its version is not known.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        tensors, state = read_tensors(folder / TENSORS), read_json(folder / STATE)
        position = Position(manifest.epoch, manifest.step)
        return Checkpoint(folder, position, tensors, state, manifest.metric, manifest.is_best)

    def load_newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. Damaged ones that are newer are set aside with a warning
        each."""
        return self._first_whole(self._names()[::-1])

    def load_best(self) -> Checkpoint | None:
        """The last checkpoint that was saved as the best, or None; damaged ones are set aside with a
        warning."""
        return self._first_whole([name for name in self._names()[::-1] if self._is_best(name)])

    def paths(self) -> list[Path]:
        """Folders of all checkpoints, oldest first, not validated."""
        return [self.folder / name for name in self._names()]

    def _names(self) -> list[str]:
        return sorted(filter(_NAME.fullmatch, self._folders()), key=_serial)

    def _folders(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return [entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]

    def _next_serial(self) -> int:
        """One more than any checkpoint has, also than those set aside."""
        names = (name.removeprefix(_DAMAGED) for name in self._folders())
        return max((_serial(name) for name in names if _NAME.fullmatch(name)), default=0) + 1

    def _first_whole(self, names: list[str]) -> Checkpoint | None:
        for name in names:
            try:
                return self.load(self.folder / name)
            except DamagedCheckpoint as error:
                logging.warning("%s%s; the checkpoint before it is used", error, self._set_aside(name))
        return None

    def _set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint, so that it is neither the best nor one of those kept; returns what to
        say of it."""
        aside = self.folder / f"{_DAMAGED}{name}"
        with contextlib.suppress(OSError):
            if not self.read_only:
                os.rename(self.folder / name, aside)
                sync(self.folder)
                return f", set aside as {aside.name}"
        return ""

    def _is_best(self, name: str) -> bool:
        try:
            return read_manifest(self.folder / name, check_files=False).is_best
        except DamagedCheckpoint:
            return False

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for entry in self.folder.iterdir():
                if entry.name.startswith((_WRITING, _REMOVED)):
                    _remove(entry)
        except OSError as error:
            raise write_failed(self.folder, error) from error

    def _copy_attached(self, writing: Path) -> None:
        """No links: one damaged file would be that of all checkpoints."""
        for name in ATTACHED:
            source = self.folder / "attached" / name
            if source.exists():
                shutil.copyfile(source, writing / name)
                sync(writing / name)

    def _prune(self) -> None:
        names = self._names()
        best = next((name for name in names[::-1] if self._is_best(name)), None)
        for name in names[: -self.keep_last]:
            if name != best:
                removed = self.folder / f"{_REMOVED}{name}"
                os.rename(self.folder / name, removed)
                _remove(removed)


def _serial(name: str) -> int:
    return int(name.split("-", maxsplit=1)[0])


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
