"""Prepared sequences, memory-mapped: flat columns of events, and where each user's begin and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.config.sections import Catalogue
from generative_recommenders.data.feature_tables import describe
from generative_recommenders.data.manifest import (
    OFFSETS,
    UNRATED,
    FeatureSpec,
    Manifest,
    column_file,
    read_manifest,
    vocabulary_file,
)
from generative_recommenders.data.preparation.digests import EventDigests
from generative_recommenders.data.preparation.event_store import CHUNK_EVENTS, chunks, user_blocks
from generative_recommenders.data.readers.tables import check_parquet
from generative_recommenders.data.schema import KNOWN_KINDS, STORED, large_strings
from generative_recommenders.data.sources.download import file_digest
from generative_recommenders.errors import UserError

TABLE_ROWS = 512
"""Rows of ids and features read at a time."""
MOST_UNPACKED = 300
"""Times its size that a table may take in memory; names that repeat take some ten times."""
VERIFY_EVENTS = 1 << 21
"""Events that are compared with the hash at a time."""


@dataclass(frozen=True)
class SequenceDataset:
    """A prepared folder.

    items: ``[E]`` int32, internal ids 1..V. ratings: ``[E]`` float32 or None. timestamps: ``[E]`` int64 seconds or
    None. offsets: ``[U + 1]`` int64; user u (0-based) owns events ``offsets[u]`` to ``offsets[u + 1]``, oldest first.
    extra: further columns of the events, ``[E]``, by name, see `schema.STORED`. unrated: items after the rated ones
    that belong to the catalogue, see `with_catalogue`.
    """

    folder: Path
    manifest: Manifest
    items: np.ndarray
    ratings: np.ndarray | None
    timestamps: np.ndarray | None
    offsets: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    unrated: int = 0

    @classmethod
    def open(cls, folder: str | Path) -> SequenceDataset:
        """Map the folder's columns; UserError when it is none, of another version, or cut short."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        maps: dict[str, np.ndarray] = {
            name: np.memmap(column_file(folder, name, kind), STORED[kind], "r") for name, kind in manifest.kinds.items()
        }
        offsets = np.memmap(folder / OFFSETS, "<i8", "r")
        # The one column that is read whole: places of events are taken from it unchecked afterwards.
        if offsets[0] != 0 or offsets[-1] != manifest.counts["events"] or (np.diff(offsets) < 1).any():
            raise UserError(f"{folder / OFFSETS}: damaged: it does not rise from 0 to the count of events")
        for name in ("items", "users", "unrated_items"):
            if name not in manifest.counts:
                continue
            path, expected = folder / f"{name}.parquet", manifest.counts[name]
            with _reading(path):
                metadata = pq.read_metadata(path)
            check_parquet(path, metadata)
            if (rows := metadata.num_rows) != expected:
                raise UserError(f"{path}: {rows} rows, the manifest says {expected}; prepare the data again")
        items, ratings, timestamps = (maps.pop(name, None) for name in KNOWN_KINDS)
        assert items is not None
        return cls(folder, manifest, items, ratings, timestamps, offsets, maps)

    def with_catalogue(self, catalogue: Catalogue) -> SequenceDataset:
        """The same data with "all" items of the item table in the catalogue: those that nobody rated have ids V + 1 on.

        UserError for a folder of a release that did not keep them.
        """
        counts, manifest = self.manifest.counts, self.manifest
        if catalogue == "rated":
            return self
        # Under a filter there never are any: items that it left out are no candidates.
        if "unrated_items" not in counts and manifest.filter == "none" and self.feature_specs("item"):
            raise UserError(
                f"{self.folder}: prepared by a release that kept no items without ratings, which train_fn.catalogue "
                "'all' asks for; prepare the data again"
            )
        return replace(self, unrated=counts.get("unrated_items", 0))

    @property
    def num_users(self) -> int:
        """Users with at least one event."""
        return self.manifest.counts["users"]

    @property
    def num_items(self) -> int:
        """Items of the catalogue (V); ids are 1..V."""
        return self.manifest.counts["items"] + self.unrated

    @property
    def num_events(self) -> int:
        """Events of all users (E)."""
        return self.manifest.counts["events"]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """``[E]`` by name, as `Manifest.kinds` lists them: item, rating, timestamp and the further columns, as
        stored."""
        known = {"item": self.items, "rating": self.ratings, "timestamp": self.timestamps}
        return {**{name: values for name, values in known.items() if values is not None}, **self.extra}

    @property
    def lengths(self) -> np.ndarray:
        """``[U]`` int64, events of each user."""
        return np.diff(self.offsets)

    def user_blocks(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) of consecutive users who have about as many events together as are held at
        once."""
        return user_blocks(self.offsets, CHUNK_EVENTS)

    def original_user_ids(self) -> pa.ChunkedArray:
        """``[U]`` strings; row u is user u."""
        return self._original_ids("user")

    def original_item_ids(self) -> pa.ChunkedArray:
        """``[V]`` strings; row i is internal id i + 1."""
        return self._original_ids("item")

    def item_features(self) -> pa.Table | None:
        """``[V]`` rows, a column a feature, row i for internal id i + 1; None without features."""
        return self._features("item")

    def user_features(self) -> pa.Table | None:
        """``[U]`` rows, a column a feature, row u for user u; None without features."""
        return self._features("user")

    def feature_specs(self, owner: str) -> list[FeatureSpec]:
        """The features of ``item`` or ``user`` that the manifest lists."""
        return [spec for spec in self.manifest.features if spec.owner == owner]

    def _features(self, owner: str) -> pa.Table | None:
        names = [spec.name for spec in self.feature_specs(owner)]
        return self._read_table(f"{owner}s", names) if names else None

    def _read_table(self, owners: str, columns: list[str]) -> pa.Table:
        """Columns of ``users`` or ``items``, as many rows as the manifest says."""
        table = read_rows(self.folder / f"{owners}.parquet", columns, self.manifest.counts[owners])
        if owners == "items" and self.unrated:
            table = pa.concat_tables([table, read_rows(self.folder / UNRATED, columns, self.unrated)])
        return table

    def vocabulary(self, name: str) -> pa.ChunkedArray:
        """``[C]`` strings of a categorical event column; row i is id i + 1."""
        (column,) = (each for each in self.manifest.event_columns if each.name == name)
        return read_rows(vocabulary_file(self.folder, name), [name], column.cardinality)[name]

    def texts(self) -> dict[str, pa.ChunkedArray]:
        """What numbers of users (from 0), items and categories (from 1) stand for, by the name of their column."""
        categorical = [each.name for each in self.manifest.event_columns if each.kind == "categorical"]
        ids = {"user": self.original_user_ids(), "item": self.original_item_ids()}
        return {**ids, **{name: self.vocabulary(name) for name in categorical}}

    def _original_ids(self, owner: str) -> pa.ChunkedArray:
        ids = self._read_table(f"{owner}s", [owner])[owner]
        if ids.null_count or not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
            raise UserError(f"{self.folder}: the {owner}s' ids are no text; prepare the data again")
        return ids

    def verify(self) -> None:
        """Read everything and compare with the hashes; UserError if it was changed. Takes seconds."""
        for name, checksum in self.manifest.tables.items():
            if file_digest(self.folder / name, "sha256") != checksum:
                raise UserError(f"{self.folder / name}: not the file that was prepared; prepare the data again")
        for owner in ("item", "user"):
            features = self._features(owner)
            if features is not None and describe(owner, features) != self.feature_specs(owner):
                raise UserError(
                    f"{self.folder}: the manifest does not describe the {owner}s' features; prepare the data again"
                )
        if self.items.min() < 1 or self.items.max() > self.num_items:
            raise UserError(f"{self.folder}: item ids outside 1..{self.num_items}; prepare the data again")
        texts = {name: large_strings(values) for name, values in self.texts().items()}
        for name in self.extra.keys() & texts.keys():
            if self.extra[name].min() < 0 or self.extra[name].max() > len(texts[name]):
                raise UserError(f"{self.folder}: ids of {name} outside 0..{len(texts[name])}; prepare the data again")
        digests = EventDigests(texts, self.manifest.kinds)
        for part in chunks(self.num_events, VERIFY_EVENTS):
            events = np.arange(part.start, part.stop)
            rows = np.searchsorted(self.offsets, events, side="right") - 1  # the users of these events
            columns = {name: values[part] for name, values in self.columns.items()}
            digests.add(rows, events - self.offsets[rows], columns)
        if digests.hashes() != (self.manifest.data_hash, self.manifest.columns_hash):
            raise UserError(
                f"{self.folder}: the data does not match its hash; the folder was changed, prepare it again"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what reading a damaged table raises into UserError; a pipe or device would keep the reader waiting."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: missing, damaged or cut short; prepare the data again") from error


def read_rows(path: Path, columns: list[str], rows: int) -> pa.Table:
    """Columns of a Parquet file that must have so many rows; UserError for another, or for one that is damaged."""
    unpacked, batches = 0, []
    with _reading(path):
        most = MOST_UNPACKED * path.stat().st_size + (64 << 20)
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if missing := set(columns) - set(schema.names):
                raise UserError(f"{path}: column {min(missing)!r} is missing; prepare the data again")
            # Few rows at a time: a short file that stands for many equal strings is refused before it fills the memory.
            for batch in file.iter_batches(TABLE_ROWS, columns=columns, use_threads=False):
                unpacked += batch.nbytes
                if unpacked > most:
                    raise UserError(
                        f"{path}: it unpacks to more than {MOST_UNPACKED} times its size; prepare the data again"
                    )
                batches.append(batch)
        empty = pa.schema([schema.field(name) for name in columns]).empty_table()
        table = (pa.Table.from_batches(batches) if batches else empty).select(columns)
        table.validate(full=True)
    if len(table) != rows:
        raise UserError(f"{path}: damaged; prepare the data again")
    return table
