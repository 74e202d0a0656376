"""``manifest.json`` of a prepared folder: what it holds, how it was made, and the checks on opening it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from generative_recommenders.config.sections import FeatureKind
from generative_recommenders.data.schema import KNOWN, KNOWN_KINDS, STORED, EventColumn
from generative_recommenders.errors import UserError

VERSION = 2
"""1 knew no further event columns, statistics or order; such folders are read as they are."""
_READABLE = (1, 2)
FILE_NAME = "manifest.json"
TABLES = ("items.parquet", "users.parquet")
UNRATED = "unrated_items.parquet"
"""Rows like those of ``items.parquet``, of items that nobody rated: ids V + 1 on where a run takes them in."""
OFFSETS = "offsets.int64.bin"

StoredKind = Literal[FeatureKind, "text"]
"""Text is shown and not learnt from."""


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of items or users.

    cardinality: distinct values (0 if text or numerical).
    source: the file that holds it. owner: ``item`` or ``user``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: StrictStr
    kind: StoredKind
    cardinality: StrictInt
    source: StrictStr
    owner: StrictStr


def _numbers(*names: str, least: float = 1) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A check that these numbers are there and at least as large."""

    def check(numbers: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            if not numbers.get(name, least - 1) >= least:  # NaN too
                raise ValueError(f"{name} is {numbers.get(name)}")
        return numbers

    return check


_Sizes = Annotated[
    dict[StrictStr, Annotated[StrictInt, Field(ge=0)]], AfterValidator(_numbers("users", "items", "events"))
]
_Counts = Annotated[_Sizes, AfterValidator(_numbers("users_with_one_event", least=0))]
# `verify` opens what is named here, which a manifest of somebody else may not choose freely.
_TableName = Annotated[StrictStr, Field(pattern=f"^({'|'.join(map(re.escape, (*TABLES, UNRATED)))})$")]
_Number = Annotated[StrictInt | StrictFloat, Field(ge=0)]
_Lengths = Annotated[dict[StrictStr, _Number], AfterValidator(_numbers("min", "median", "mean", "max"))]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder says about itself.

    counts_before: events, users, items as read. counts: the same after the filter; ``unrated_items`` where features of
    items tell of more than were rated, and no filter left any out. lengths: min, median,
    mean, max of the users' sequences. data_hash: see ``digests``. source: where the ratings came from.
    tables: sha256 of ``items.parquet`` and ``users.parquet``, which hold ids and features; empty in folders of
    programs that did not write it. split_hashes: by protocol, those that fit the columns; empty likewise. They
    leave the tables out: they are of the events alone, whichever engine and Parquet writer made the folder.
    event_columns: further columns of the events. columns_hash: of their values; "" without any. statistics: numbers
    that a summary shows (duplicates, ties, repeated and unseen targets), by name. choices: how events were ordered and
    kept (``tie_order``, ``duplicates``, and what makes them reproducible), by name.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: StrictStr
    counts_before: _Sizes
    counts: _Counts
    lengths: _Lengths
    has_ratings: StrictBool
    has_timestamps: StrictBool
    data_hash: StrictStr
    filter: StrictStr
    features: list[FeatureSpec] = field(default_factory=list)
    source: dict[StrictStr, Any] = field(default_factory=dict)
    tables: dict[_TableName, StrictStr] = field(default_factory=dict)
    split_hashes: dict[StrictStr, StrictStr] = field(default_factory=dict)
    event_columns: list[EventColumn] = field(default_factory=list)
    columns_hash: StrictStr = ""
    statistics: dict[StrictStr, _Number] = field(default_factory=dict)
    choices: dict[StrictStr, StrictStr] = field(default_factory=dict)
    version: StrictInt = VERSION

    @property
    def kinds(self) -> dict[str, str]:
        """Columns of the events that the folder holds, with their kinds: item, rating, timestamp and the further
        ones."""
        there = {"item": True, "rating": self.has_ratings, "timestamp": self.has_timestamps}
        known = {name: kind for name, kind in KNOWN_KINDS.items() if there[name]}
        return known | {each.name: each.kind for each in self.event_columns}

    @property
    def features_hash(self) -> str:
        """Identity of the tables and of what is said about their features: 32 hexadecimal digits."""
        facts = [
            {name: self.tables[name] for name in TABLES if name in self.tables},
            [asdict(spec) for spec in self.features],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


_MANIFEST = TypeAdapter(Manifest)


def column_file(folder: Path, name: str, kind: str) -> Path:
    """The file of a column of the events: raw little-endian numbers, nothing else."""
    stem = f"{name}s" if name in KNOWN else f"event.{name}"
    return folder / f"{stem}.{STORED[kind].name}.bin"


def vocabulary_file(folder: Path, name: str) -> Path:
    """The table of a categorical column's values: row i is id i + 1."""
    return folder / f"event.{name}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    # a file name that is not UTF-8 becomes the JSON escapes that read back as the same name
    (folder / FILE_NAME).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


SIZE_LIMIT = 16 << 20
"""Bytes of a manifest; a whole one has some thousands."""


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``, check it and the sizes of the flat columns; UserError if they are wrong."""
    path = folder / FILE_NAME
    if not os.path.isfile(path):  # False for a name that is too long
        raise UserError(f"{folder}: not a prepared folder (no {path.name}); run preprocess_public_data.py")
    if path.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{path}: damaged: longer than {SIZE_LIMIT} bytes; prepare the data again")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or cut short ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: damaged: it holds no object")
    version = settings.get("version")  # before the fields, which another version may have others of
    if version not in _READABLE:
        raise UserError(
            f"{path}: prepared by version {version!r}, this program reads {VERSION}; prepare the data again"
        )
    try:
        manifest = _MANIFEST.validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        found = "" if first["type"] == "missing" else f", and is {str(first['input'])[:40]!r}"
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where!r}: {what}{found}; prepare the data again") from None
    sizes = {folder / OFFSETS: 8 * (manifest.counts["users"] + 1)}
    for name, kind in manifest.kinds.items():
        sizes[column_file(folder, name, kind)] = manifest.counts["events"] * STORED[kind].itemsize
    for path, expected in sizes.items():
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{path}: {found}, the manifest says {expected}; the folder is damaged, prepare the data again"
            )
    return manifest
