"""``manifest.json`` of a prepared folder: what it holds, how it was made, and the checks on opening it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from generative_recommenders.data.schema import STORED, EventColumn
from generative_recommenders.errors import UserError

VERSION = 2
"""1 knew no further event columns, statistics or order; such folders are read as they are."""
_READABLE = (1, 2)
FILE_NAME = "manifest.json"
TABLES = ("items.parquet", "users.parquet")
KINDS = ("categorical", "categorical_list", "numerical", "text")
COLUMNS: dict[str, np.dtype] = {
    "items": np.dtype("<i4"),
    "ratings": np.dtype("<f4"),
    "timestamps": np.dtype("<i8"),
    "offsets": np.dtype("<i8"),
}


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of items or users.

    kind: ``categorical``, ``categorical_list``, ``numerical``, or ``text``, which is shown and not learnt from.
    cardinality: distinct values (0 if text or numerical).
    source: the file that holds it. owner: ``item`` or ``user``.
    """

    name: str
    kind: str
    cardinality: int
    source: str
    owner: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder says about itself.

    counts_before: events, users, items as read. counts: the same after the filter. lengths: min, median,
    mean, max of the users' sequences. data_hash: see ``digests``. source: where the ratings came from.
    tables: sha256 of ``items.parquet`` and ``users.parquet``, which hold ids and features; empty in folders of
    programs that did not write it. split_hashes: by protocol, those that fit the columns; empty likewise. They
    leave the tables out: they are of the events alone, whichever engine and Parquet writer made the folder.
    event_columns: further columns of the events. columns_hash: of their values; "" without any. statistics: numbers that a
    summary shows (duplicates, ties, repeated and unseen targets), by name. choices: how events were ordered and kept
    (``tie_order``, ``duplicates``, and what makes them reproducible), by name.
    """

    name: str
    counts_before: dict[str, int]
    counts: dict[str, int]
    lengths: dict[str, float]
    has_ratings: bool
    has_timestamps: bool
    data_hash: str
    filter: str
    features: list[FeatureSpec] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    split_hashes: dict[str, str] = field(default_factory=dict)
    event_columns: list[EventColumn] = field(default_factory=list)
    columns_hash: str = ""
    statistics: dict[str, float] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def columns(self) -> list[str]:
        """Names of the flat columns that the folder holds."""
        absent = {"ratings": not self.has_ratings, "timestamps": not self.has_timestamps}
        return [name for name in COLUMNS if not absent.get(name, False)]

    @property
    def features_hash(self) -> str:
        """Identity of the tables and of what is said about their features: 32 hexadecimal digits."""
        said = [self.tables, [asdict(spec) for spec in self.features]]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]

    def column_length(self, column: str) -> int:
        """Entries of a flat column."""
        return self.counts["users"] + 1 if column == "offsets" else self.counts["events"]


def column_file(folder: Path, column: str) -> Path:
    """The file of a flat column: raw little-endian numbers, nothing else."""
    return folder / f"{column}.{COLUMNS[column].name}.bin"


def event_file(folder: Path, name: str, kind: str) -> Path:
    """The file of a further column of the events, like `column_file`."""
    return folder / f"event.{name}.{STORED[kind].name}.bin"


def vocabulary_file(folder: Path, name: str) -> Path:
    """The table of a categorical column's values: row i is id i + 1."""
    return folder / f"event.{name}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    # a file name that is not UTF-8 becomes the JSON escapes that read back as the same name
    (folder / FILE_NAME).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``, check it and the sizes of the flat columns; UserError if they are wrong."""
    path = folder / FILE_NAME
    settings = _read_json(path)
    version = settings.get("version")
    if version not in _READABLE:
        raise UserError(
            f"{path}: prepared by version {version!r}, this program reads {VERSION}; prepare the data again"
        )
    manifest = _from_json(path, settings)
    for column in manifest.columns:
        _check_size(column_file(folder, column), manifest.column_length(column) * COLUMNS[column].itemsize)
    for each in manifest.event_columns:
        size = manifest.counts["events"] * STORED[each.kind].itemsize
        _check_size(event_file(folder, each.name, each.kind), size)
    return manifest


SIZE_LIMIT = 16 << 20
"""Bytes of a manifest; a whole one has some thousands."""


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # False for a name that is too long
        raise UserError(
            f"{path.parent}: not a prepared folder (no {path.name}); run preprocess_public_data.py"
        )
    if path.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{path}: damaged: longer than {SIZE_LIMIT} bytes; prepare the data again")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or cut short ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: damaged: it holds no object")
    return settings


_FIELD_TYPES = {
    "name": str,
    "counts_before": dict,
    "counts": dict,
    "lengths": dict,
    "has_ratings": bool,
    "has_timestamps": bool,
    "data_hash": str,
    "filter": str,
    "features": list,
    "source": dict,
    "tables": dict,
    "split_hashes": dict,
    "event_columns": list,
    "columns_hash": str,
    "statistics": dict,
    "choices": dict,
    "version": int,
}


def _from_json(path: Path, settings: dict[str, Any]) -> Manifest:
    added = {"event_columns": [], "columns_hash": "", "statistics": {}, "choices": {}}
    settings = {"tables": {}, "split_hashes": {}, **added, **settings}
    for name, kind in _FIELD_TYPES.items():
        if not isinstance(settings.get(name), kind):
            raise UserError(f"{path}: field {name!r} is missing or of the wrong type; prepare the data again")
    unknown = settings.keys() - _FIELD_TYPES.keys()
    if unknown:
        raise UserError(f"{path}: unknown field {min(unknown)!r}; prepare the data again")
    for counts in (settings["counts"], settings["counts_before"]):
        for name in ("users", "items", "events"):
            _check_number(path, f"the count of {name}", counts.get(name), 1, int)
    single = settings["counts"].get("users_with_one_event")
    _check_number(path, "the count of users_with_one_event", single, 0, int)
    for name in ("min", "median", "mean", "max"):
        _check_number(path, f"the {name} of the lengths", settings["lengths"].get(name), 1, int, float)
    if settings["tables"] and not _are_checksums(settings["tables"]):
        raise UserError(f"{path}: damaged checksums of the tables; prepare the data again")
    if not all(isinstance(each, str) for each in settings["split_hashes"].values()):
        raise UserError(f"{path}: damaged split hashes; prepare the data again")
    features = [_feature(path, entry) for entry in settings["features"]]
    for name, value in settings["statistics"].items():
        _check_number(path, f"the statistic {name}", value, 0, int, float)
    if not all(isinstance(each, str) for each in settings["choices"].values()):
        raise UserError(f"{path}: damaged choices; prepare the data again")
    columns = [_event_column(path, entry) for entry in settings["event_columns"]]
    return Manifest(**{**settings, "features": features, "event_columns": columns})


def _are_checksums(tables: dict[str, Any]) -> bool:
    return tables.keys() == set(TABLES) and all(isinstance(each, str) for each in tables.values())


def _check_number(path: Path, what: str, value: Any, least: int, *kinds: type) -> None:
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not value >= least:
        raise UserError(f"{path}: {what} is {str(value)[:40]}; prepare the data again")


def _feature(path: Path, entry: Any) -> FeatureSpec:
    types = {"name": str, "kind": str, "cardinality": int, "source": str, "owner": str}
    good = isinstance(entry, dict) and entry.keys() == types.keys()
    if (
        not good
        or not all(isinstance(entry[name], kind) for name, kind in types.items())
        or entry["kind"] not in KINDS
    ):
        raise UserError(
            f"{path}: damaged description of a feature: {str(entry)[:80]!r}; prepare the data again"
        )
    return FeatureSpec(**entry)


def _event_column(path: Path, entry: Any) -> EventColumn:
    types: dict[str, Any] = {
        "name": str,
        "kind": str,
        "cardinality": int,
        "mean": (int, float),
        "std": (int, float),
    }
    good = isinstance(entry, dict) and entry.keys() == types.keys()
    good = good and all(isinstance(entry[name], kind) for name, kind in types.items())
    if (
        not good
        or entry["kind"] not in STORED
        or not re.fullmatch(r"[A-Za-z]\w*", entry["name"])
        or not (entry["cardinality"] >= 0 and entry["std"] > 0 and abs(entry["mean"]) < float("inf"))
    ):
        raise UserError(
            f"{path}: damaged description of a column: {str(entry)[:80]!r}; prepare the data again"
        )
    return EventColumn(**entry)


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(
            f"{path}: {found}, the manifest says {expected}; the folder is damaged, prepare the data again"
        )
