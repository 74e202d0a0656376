"""Files of a checkpoint: synced to the disk when written, checked as untrusted input when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch

from generative_recommenders.errors import UserError

FORMAT = "generative_recommenders checkpoint"
VERSION = 2
TENSORS, STATE = "tensors.safetensors", "state.json"
ATTACHED = ("item_ids.parquet", "settings.json", "resolved.gin")
_KNOWN_FILES = {TENSORS, STATE, *ATTACHED}
_MANIFEST = "manifest.json"
_LIMITS = {_MANIFEST: 1 << 20, STATE: 16 << 20, "settings.json": 1 << 20, "resolved.gin": 1 << 20}
"""Bytes of files that are read at once: more is neither written nor read."""
_BATCH_ROWS = 32
"""Item ids read at a time."""


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing, cut short or altered."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. metric: the validation metric that "best" is judged by, None if
    not measured."""

    epoch: int
    step: int
    metric: float | None
    is_best: bool


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Describes the files in ``folder`` as they are now. Its own checksum covers all of its other fields."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest), "files": files}
    write_json(folder / _MANIFEST, {**content, "sha256": _checksum(content)})


def read_manifest(folder: Path, check_files: bool = True) -> Manifest:
    """The manifest of a checkpoint folder; with check_files the files' sizes and checksums are compared
    too."""
    path = folder / _MANIFEST
    if not folder.is_dir():
        raise DamagedCheckpoint(f"no checkpoint at {folder}")
    content = read_json(path)
    if content.pop("sha256", None) != _checksum(content) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"damaged checkpoint {folder}: {_MANIFEST} is not what was written")
    if content.get("version") != VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {content.get('version')}, this program reads version "
            f"{VERSION}: use the program that wrote it"
        )
    if check_files:
        _check_files(folder, content.get("files"))
    return _parse_manifest(folder, content)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Any dtypes, devices and strides; tensors that share storage are written each for itself."""
    content: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        content[name] = value.clone() if storage in storages else value
        storages.add(storage)
    try:
        safetensors.torch.save_file(content, path)
    except safetensors.SafetensorError as error:  # how the library reports a failed write
        raise OSError(str(error)) from error
    sync(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(
            f"damaged checkpoint {path.parent}: {path.name}: {one_line(error)}"
        ) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path) -> dict[str, Any]:
    _check_length(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"damaged checkpoint {path.parent}: {path.name}: {one_line(error)}"
        ) from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"damaged checkpoint {path.parent}: {path.name} is not a JSON object")
    return value


def read_text(path: Path) -> str:
    _check_length(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(
            f"damaged checkpoint {path.parent}: {path.name}: {one_line(error)}"
        ) from error


def _check_length(path: Path) -> None:
    """Refuses a file that is longer than any that was written, before it fills the memory. A missing one is
    said where it is read."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LIMITS.get(path.name, math.inf):
            raise DamagedCheckpoint(f"damaged checkpoint {path.parent}: {path.name} is too long or no file")


def write_text(path: Path, text: str) -> None:
    content = text.encode()
    if len(content) > _LIMITS.get(path.name, math.inf):
        raise UserError(
            f"{path.name} of a checkpoint would be {len(content)} bytes, more than the {_LIMITS[path.name]} "
            "that are read back"
        )
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_item_ids(folder: Path, item_ids: pa.Array) -> None:
    """Original ids ``[V]``; uncompressed, so that a small file cannot claim to hold much."""
    table = pa.table({"item_id": item_ids.cast(pa.string())})
    pq.write_table(table, folder / "item_ids.parquet", compression="none", use_dictionary=False)
    sync(folder / "item_ids.parquet")


def read_item_ids(folder: Path) -> pa.Array:
    """The strings that `write_item_ids` wrote; valid UTF-8, none missing."""
    path = folder / "item_ids.parquet"
    try:
        with pq.ParquetFile(path) as file:
            table = pa.Table.from_batches(_plain_batches(path, file), file.schema_arrow)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(
            f"damaged checkpoint {folder}: item_ids.parquet: {one_line(error)}"
        ) from error
    if (
        table.schema.names != ["item_id"]
        or table.schema.types != [pa.string()]
        or table["item_id"].null_count
    ):
        raise DamagedCheckpoint(f"damaged checkpoint {folder}: item_ids.parquet holds no column of item ids")
    return table["item_id"].combine_chunks()


def _plain_batches(path: Path, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The rows, a few at a time; refuses a small file that would fill the memory: `write_item_ids` packs nothing, so what
    is read is no more than the file holds. (Only numbers of the whole file and of row groups are looked at: pyarrow
    aborts the process on faulty metadata of columns.)"""
    held, total = path.stat().st_size, 0
    metadata = file.metadata
    claimed = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    packed = DamagedCheckpoint(
        f"damaged checkpoint {path.parent}: {path.name} is packed, and was not written so"
    )
    if max(metadata.num_rows, claimed) > held:
        raise packed
    for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
        total += batch.nbytes
        if total > 4 * held + (1 << 20):
            raise packed
        yield batch


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failed(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or one_line(error)
    return UserError(f"could not write a checkpoint to {folder}: {reason}; older checkpoints are whole")


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _hash_file(path)}


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, files: Any) -> None:
    """Compares the files with the manifest. Names are from a closed set, so that no path leaves the
    folder."""
    if not isinstance(files, dict) or not {TENSORS, STATE} <= set(files) <= _KNOWN_FILES:
        raise DamagedCheckpoint(
            f"damaged checkpoint {folder}: {_MANIFEST} does not list the files of a checkpoint"
        )
    for name, description in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"damaged checkpoint {folder}: {name} is missing")
        _check_length(path)
        try:
            found = _describe(path)
        except OSError as error:
            raise DamagedCheckpoint(f"damaged checkpoint {folder}: {name}: {one_line(error)}") from error
        if found != description:
            raise DamagedCheckpoint(f"damaged checkpoint {folder}: {name} is not what was written")


def _parse_manifest(folder: Path, content: Mapping[str, Any]) -> Manifest:
    epoch, step, metric, best = (content.get(key) for key in ("epoch", "step", "metric", "is_best"))
    measured = metric is None or type(metric) in (int, float)
    if not (_is_count(epoch) and _is_count(step) and measured and type(best) is bool):
        raise DamagedCheckpoint(f"damaged checkpoint {folder}: {_MANIFEST} lacks a position or metric")
    return Manifest(epoch, step, metric, best)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0
