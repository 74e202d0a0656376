"""Files of a checkpoint: synced to the disk when written, compared with their checksums when read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from annotated_types import Len
from pydantic import Field

from generative_recommenders.config.fields import Count, StrictModel, validated
from generative_recommenders.errors import UserError, first_line

FORMAT = "generative_recommenders checkpoint"
VERSION = 2
MANIFEST, TENSORS, STATE = "manifest.json", "tensors.safetensors", "state.json"
ROW_FILE = re.compile(r"rows-\d{1,6}-of-\d{1,6}\.safetensors")
ITEM_IDS, SETTINGS, RESOLVED_GIN = "item_ids.parquet", "settings.json", "resolved.gin"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing or fail their checksums."""


class Manifest(StrictModel):
    """Header of a checkpoint. metric: the validation metric that "best" is judged by, None if not measured.

    row_files: those of a sharded item table, and which of its rows [first, stop) each holds.
    """

    epoch: Count
    step: Count
    metric: float | None
    is_best: bool
    row_files: dict[str, Annotated[list[Count], Len(2, 2)]] = Field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Describes the files in ``folder`` as they are now. Its own checksum covers all of its other fields."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    # Without row_files where there are none, as releases before sharded tables wrote it.
    fields = manifest.model_dump(exclude=None if manifest.row_files else {"row_files"})
    content = {"format": FORMAT, "version": VERSION, **fields, "files": files}
    write_bytes(folder / MANIFEST, json_bytes({**content, "sha256": _checksum(content)}))


def read_manifest(folder: Path, checked: Collection[str] | None = None) -> Manifest:
    """The manifest of a checkpoint folder. checked: names of the files of which every byte is compared with it, None
    for all.

    DamagedCheckpoint: files are missing or not what was written. UserError: the checkpoint cannot be read, or is of
    another version of the format.
    """
    damaged = DamagedCheckpoint(f"damaged checkpoint {folder}: {MANIFEST} is not what was written")
    if not folder.is_dir():
        raise DamagedCheckpoint(f"no checkpoint at {folder}")
    with _open(folder / MANIFEST) as file:
        text = file.read()
    try:
        content = json.loads(text)
        if content.pop("sha256") != _checksum(content) or content.pop("format") != FORMAT:
            raise damaged
        version, files = content.pop("version"), content.pop("files")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged from error
    if version != VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {str(version)[:20]}, this program reads version {VERSION}: use "
            "the program that wrote it"
        )
    # Names are from a closed set, so that none leads out of the folder.
    known = {TENSORS, STATE, ITEM_IDS, SETTINGS, RESOLVED_GIN}
    others = {name for name in files if not ROW_FILE.fullmatch(name)} if isinstance(files, dict) else set()
    if not {TENSORS, STATE} <= others <= known:
        raise UserError(f"checkpoint {folder}: {MANIFEST} does not list the files of a checkpoint")
    for name in files if checked is None else files.keys() & checked:
        if _describe(folder / name) != files[name]:
            raise DamagedCheckpoint(f"damaged checkpoint {folder}: {name} is not what was written")
    manifest = validated(Manifest, content, f"checkpoint {folder}: {MANIFEST}")
    bounds = sorted(manifest.row_files.values())
    ends = [0, *(stop for _, stop in bounds)]
    if {*files} - others != {*manifest.row_files} or [first for first, _ in bounds] != ends[:-1]:
        raise UserError(f"checkpoint {folder}: {MANIFEST} does not list the rows of a whole table")
    return manifest


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
    with _parsing(path):
        return safetensors.torch.load_file(path)


class RowFiles:
    """Tensors of which a checkpoint's files hold rows, one file a shard. bounds: by name of the file, as in the
    manifest.

    shapes: dtype and shape of each whole tensor. UserError for files that do not belong together.
    """

    def __init__(self, folder: Path, bounds: Mapping[str, list[int]]) -> None:
        self.folder = folder
        self.bounds = sorted(bounds.items(), key=lambda each: each[1])
        self.shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
        for name, (first, stop) in self.bounds:
            with _parsing(folder / name), safetensors.safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no mapping
                    piece = file.get_slice(key)
                    (rows, *width), dtype = piece.get_shape(), piece[:0].dtype
                    known = self.shapes.setdefault(key, (dtype, [0, *width]))
                    if rows != stop - first or known != (dtype, [first, *width]):
                        raise ValueError(f"{key} does not hold rows {first} to {stop} of the others' table")
                    known[1][0] = stop

    def read(self, name: str, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of a tensor."""
        dtype, shape = self.shapes[name]
        rows = torch.empty((stop - first, *shape[1:]), dtype=dtype)
        for path, (start, end) in self.bounds:
            a, b = max(first, start), min(stop, end)
            if a < b:
                with _parsing(self.folder / path), safetensors.safe_open(self.folder / path, "pt") as file:
                    if (a, b) == (first, stop) == (start, end):
                        return file.get_tensor(name)  # as it lies in the file
                    rows[a - first : b - first] = file.get_slice(name)[a - start : b - start]
        return rows


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def read_json(path: Path) -> dict[str, Any]:
    """UserError where it is no JSON object."""
    with _parsing(path), _open(path) as file:
        value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is on the disk when this returns."""
    path.write_bytes(content)
    sync(path)


def item_id_bytes(item_ids: pa.Array) -> bytes:
    """Original ids ``[V]`` as Parquet; uncompressed, so that a small file cannot claim to hold much."""
    sink, table = io.BytesIO(), pa.table({"item_id": item_ids.cast(pa.string())})
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def read_item_ids(path: Path) -> pa.Array:
    """The strings that `item_id_bytes` wrote; valid UTF-8, none missing."""
    with _parsing(path), pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        unpacked = sum(file.metadata.row_group(each).total_byte_size for each in groups)
        if max(unpacked, file.metadata.num_rows) > path.stat().st_size:
            raise ValueError("it is packed, and was not written so")
        table = file.read(use_threads=False)
        table.validate(full=True)
        if table.schema != pa.schema([("item_id", pa.string())]) or table["item_id"].null_count:
            raise ValueError("it holds no column of item ids")
        return table["item_id"].combine_chunks()


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """A file for reading. One that is missing is damage; one that the system does not let us read is not, so that
    nothing is set aside for a permission or a failing disk."""
    try:
        # No link leads out of the folder, no pipe keeps the program waiting.
        if path.is_symlink() or not path.is_file():
            raise FileNotFoundError
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"damaged checkpoint {path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise UserError(f"checkpoint {path.parent}: {path.name} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Content that no program of ours wrote, though its checksum is right."""
    try:
        yield
    except (safetensors.SafetensorError, pa.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"checkpoint {path.parent}: {path.name}: {first_line(error)}") from error
