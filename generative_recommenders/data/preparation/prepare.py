"""Raw ratings to a prepared folder: collect, filter, number the ids, sort by time, write.

Internal ids follow the UTF-8 byte order of the original ids. Each user's ratings are sorted by time; ties,
and data without times, keep (file, row) order. Duplicates are kept. The result depends on the input alone,
not on the engine.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import logging

from generative_recommenders.data.feature_tables import align
from generative_recommenders.data.manifest import (
    COLUMNS,
    TABLES,
    Manifest,
    column_file,
    event_file,
    vocabulary_file,
    write_manifest,
)
from generative_recommenders.data.preparation import digests
from generative_recommenders.data.preparation.event_store import (
    BYTES_PER_EVENT,
    CHUNK_EVENTS,
    EventCollector,
    Events,
    chunks,
    write_numbers,
)
from generative_recommenders.data.preparation.filters import apply_filter, parse_filter
from generative_recommenders.data.preparation.folder import new_folder
from generative_recommenders.data.readers.events import EventReader, RawRatings
from generative_recommenders.data.readers.times import NANOSECONDS
from generative_recommenders.data.schema import STORED, EventColumn
from generative_recommenders.data.sources.download import file_digest
from generative_recommenders.data.splits import PROTOCOLS
from generative_recommenders.errors import UserError

SORT_BYTES_PER_EVENT = 120
DEFAULT_MEMORY_LIMIT = 4 << 30


def prepared_path(data_root: str | Path, name: str) -> Path:
    """Where the data set ``name`` lies below ``data_root`` when prepared; UserError for an odd name."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"the name {name!r} of a data set must consist of letters, digits and . _ + -")
    return Path(data_root) / "prepared" / name


def prepare(raw: RawRatings, out_dir: str | Path, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> Manifest:
    """Prepare ``raw`` into the folder ``out_dir`` (replaced only on success) and return its manifest.

    memory_limit: bytes that events may take; beyond it they are kept in files beside the target. The distinct
    ids must fit in memory in any case. Raises UserError for bad input and for counts other than the expected
    ones.
    """
    parse_filter(raw.filter)
    reader = EventReader(raw.files, raw.options)
    num_events = reader.estimated_events()
    return prepare_batches(raw, reader.batches(), Path(out_dir), memory_limit, num_events, NANOSECONDS["s"])


def prepare_batches(
    raw: RawRatings,
    batches: Iterable[pa.Table],
    out_dir: Path,
    memory_limit: int,
    num_events: int = 0,
    ticks_per_second: int = 1,
) -> Manifest:
    """``prepare`` with the events given as tables (columns of ``EventReader.batches``).

    num_events: about how many there are. ticks_per_second: of their ``timestamp``; events are sorted by ticks and keep seconds.
    """
    with new_folder(out_dir) as folder:
        spill = folder / "spill"
        with phase("read and number the ids"):
            events = _collect(batches, spill, memory_limit, num_events)
        with phase("filter"):
            sequences, selection = _select(events, raw.filter)
        check_expected(raw, len(sequences.user_ids), len(sequences.item_ids))
        with phase("sort and write"):
            bucket_events = max(1, min(memory_limit // SORT_BYTES_PER_EVENT, CHUNK_EVENTS))
            buckets = sorted_buckets(events, sequences, selection, bucket_events, ticks_per_second)
            hashes = write_columns(folder, sequences, buckets)
        before = {"users": len(events.user_ids), "items": len(events.item_ids), "events": len(events)}
        manifest = write_tables(folder, raw, sequences, before, hashes)
        shutil.rmtree(spill, ignore_errors=True)
    return manifest


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log the name of a phase and the time it took."""
    start = time.monotonic()
    logging.info("%s ...", name)
    yield
    logging.info("%s: %.1f s", name, time.monotonic() - start)


@dataclass(frozen=True)
class Sequences:
    """What the prepared folder will hold.

    user_ids ``[U]``, item_ids ``[V]``: large_string, UTF-8 order. offsets: ``[U + 1]`` int64. has_ratings,
    has_timestamps: which columns exist. kinds: of the further columns. vocabularies: of the categorical ones, large_string in
    UTF-8 order, the values that kept events have.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    offsets: np.ndarray
    has_ratings: bool
    has_timestamps: bool
    kinds: dict[str, str] = field(default_factory=dict)
    vocabularies: dict[str, pa.Array] = field(default_factory=dict)

    @property
    def num_events(self) -> int:
        """Events that are kept."""
        return int(self.offsets[-1])


@dataclass(frozen=True)
class Selection:
    """Which raw events are kept, and under which numbers.

    kept: ``[raw events]`` bool. user_number, item_number: ``[raw ids]`` int32, from an id's code to its place
    among the kept ones, -1 for dropped. value_number: likewise of the values of categorical columns, by name.
    """

    kept: np.ndarray
    user_number: np.ndarray
    item_number: np.ndarray
    value_number: dict[str, np.ndarray]


Bucket = tuple[np.ndarray, np.ndarray, "np.ndarray | None", "np.ndarray | None", dict[str, np.ndarray]]
"""Sorted events of consecutive users: users int32 (0-based), items int32 (0-based), ratings, timestamps, further columns as
stored."""


def _collect(batches: Iterable[pa.Table], spill: Path, memory_limit: int, num_events: int) -> Events:
    """All events; where about ``num_events`` exceed the limit, in files."""
    if num_events * BYTES_PER_EVENT <= memory_limit:
        return EventCollector(run_events=1 << 62).extend(batches).finish()
    spill.mkdir()
    run_events = max(1, memory_limit // BYTES_PER_EVENT)
    logging.info(
        "the input may exceed the memory limit: events are kept in files, %d at a time in memory", run_events
    )
    return EventCollector(run_events, spill).extend(batches).finish()


def _select(events: Events, filter_text: str) -> tuple[Sequences, Selection]:
    kept = apply_filter(events, filter_text)
    lengths = np.zeros(len(events.user_ids), np.int64)
    for part in chunks(len(events)):
        lengths += np.bincount(events.users[part][kept.events[part]], minlength=len(lengths))
    user_ids, user_number = _number_ids(events.user_ids, lengths > 0)
    item_ids, item_number = _number_ids(events.item_ids, kept.items)
    ordered = np.zeros(len(user_ids), np.int64)
    ordered[user_number[user_number >= 0]] = lengths[user_number >= 0]
    offsets = np.concatenate([[0], np.cumsum(ordered)])
    has_ratings, has_timestamps = events.ratings is not None, events.timestamps is not None
    kinds = {name: _kind(values) for name, values in events.extra.items()}
    vocabularies, value_number = {}, {}
    for name, vocabulary in events.vocabularies.items():
        kinds[name] = "categorical"
        occurs = np.zeros(len(vocabulary) + 1, bool)
        for part in chunks(len(events)):
            occurs[events.extra[name][part][kept.events[part]]] = (
                True  # a missing value, -1, takes the last place
            )
        vocabularies[name], value_number[name] = _number_ids(vocabulary, occurs[:-1])
    sequences = Sequences(user_ids, item_ids, offsets, has_ratings, has_timestamps, kinds, vocabularies)
    return sequences, Selection(kept.events, user_number, item_number, value_number)


def _kind(values: np.ndarray) -> str:
    return "numerical" if values.dtype.kind == "f" else "time"


def _number_ids(ids: pa.Array, keep: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """The kept ids in UTF-8 order, and for every code its place among them (-1: not kept)."""
    codes = np.flatnonzero(keep)
    kept = ids.take(pa.array(codes))
    order = pc.sort_indices(kept).to_numpy()
    number = np.full(len(ids), -1, np.int32)
    number[codes[order]] = np.arange(len(codes), dtype=np.int32)
    return kept.take(pa.array(order)), number


def sorted_buckets(
    events: Events, sequences: Sequences, selection: Selection, bucket_events: int, ticks_per_second: int = 1
) -> Iterator[Bucket]:
    """Yield all kept events by user and time, about ``bucket_events`` at a time (a user is never divided).

    Order keeps the full precision of the times; what is yielded is in seconds.
    """
    first = 0
    while first < len(sequences.user_ids):
        stop = sequences.offsets[first] + bucket_events
        last = max(first + 1, int(np.searchsorted(sequences.offsets, stop, side="right")) - 1)
        rows = _rows_of_users(events, selection, first, last)
        users = selection.user_number[events.users[rows]]
        times = None if events.timestamps is None else events.timestamps[rows]
        order = np.argsort(users, kind="stable") if times is None else np.lexsort((times, users))
        rows = rows[order]
        items = selection.item_number[events.items[rows]]
        ratings = None if events.ratings is None else events.ratings[rows]
        extra = {}
        for name, kind in sequences.kinds.items():
            values = events.extra[name][rows]
            if kind == "categorical":
                values = np.append(selection.value_number[name], np.int32(-1))[values] + 1
            extra[name] = values // ticks_per_second if kind == "time" else values
        seconds = None if times is None else times[order] // ticks_per_second
        yield users[order], items, ratings, seconds, extra
        first = last


def _rows_of_users(events: Events, selection: Selection, first: int, last: int) -> np.ndarray:
    """Rows of the kept events of users ``first`` to ``last`` (exclusive), in input order."""
    found = []
    for part in chunks(len(events)):
        users = selection.user_number[events.users[part]]
        inside = selection.kept[part] & (users >= first) & (users < last)
        found.append(np.flatnonzero(inside) + part.start)
    return np.concatenate(found)


def write_columns(folder: Path, sequences: Sequences, buckets: Iterable[Bucket]) -> tuple[str, str]:
    """Write the flat columns and return the data hash and the hash of the further columns ("" without any)."""
    user_hashes, item_hashes = digests.id_hashes(sequences.user_ids), digests.id_hashes(sequences.item_ids)
    value_hashes = {name: digests.id_hashes(values) for name, values in sequences.vocabularies.items()}
    total = extra_total = 0
    names = ["items"] + ["ratings"] * sequences.has_ratings + ["timestamps"] * sequences.has_timestamps
    files = {name: column_file(folder, name).open("wb") for name in names}
    files |= {name: event_file(folder, name, kind).open("wb") for name, kind in sequences.kinds.items()}
    try:
        done = 0
        for users, items, ratings, timestamps, extra in buckets:
            positions = np.arange(done, done + len(users)) - sequences.offsets[users]
            total += digests.events_digest(
                user_hashes[users], item_hashes[items], ratings, timestamps, positions
            )
            for name, values in (("items", items + 1), ("ratings", ratings), ("timestamps", timestamps)):
                if values is not None:
                    write_numbers(files[name], values.astype(COLUMNS[name], copy=False))
            for name, kind in sequences.kinds.items():
                values = np.asarray(extra[name], STORED[kind])
                words = digests.value_words(values, value_hashes.get(name))
                extra_total += digests.column_digest(name, kind, user_hashes[users], positions, words)
                write_numbers(files[name], values)
            done += len(users)
    finally:
        for file in files.values():
            file.close()
    with column_file(folder, "offsets").open("wb") as file:
        write_numbers(file, sequences.offsets.astype(COLUMNS["offsets"]))
    columns_hash = digests.hex_digest(extra_total % (1 << 128)) if sequences.kinds else ""
    return digests.hex_digest(total % (1 << 128)), columns_hash


def write_tables(
    folder: Path, raw: RawRatings, sequences: Sequences, before: dict[str, int], hashes: tuple[str, str]
) -> Manifest:
    """Write the Parquet tables of ids, features and vocabularies, and the manifest. hashes: of `write_columns`."""
    data_hash, columns_hash = hashes
    users, user_specs = align("user", sequences.user_ids, raw.user_features)
    items, item_specs = align("item", sequences.item_ids, raw.item_features)
    for name, table in zip(TABLES, (items, users)):
        pq.write_table(table, folder / name)
    for name, values in sequences.vocabularies.items():
        pq.write_table(pa.table({name: values}), vocabulary_file(folder, name))
    lengths = np.diff(sequences.offsets)
    manifest = Manifest(
        name=raw.name,
        counts_before=before,
        counts={
            "users": len(lengths),
            "items": len(sequences.item_ids),
            "events": sequences.num_events,
            "users_with_one_event": int((lengths == 1).sum()),
        },
        lengths=length_statistics(lengths),
        has_ratings=sequences.has_ratings,
        has_timestamps=sequences.has_timestamps,
        data_hash=data_hash,
        filter=raw.filter,
        features=item_specs + user_specs,
        source=raw.source,
        event_columns=[_describe(folder, sequences, name) for name in sequences.kinds],
        columns_hash=columns_hash,
        tables={name: file_digest(folder / name, "sha256") for name in TABLES},
        split_hashes=_split_hashes(data_hash, sequences.has_timestamps),
    )
    write_manifest(folder, manifest)
    return manifest


def _describe(folder: Path, sequences: Sequences, name: str) -> EventColumn:
    """A further column as the manifest has it. Its mean and deviation are taken from the file, in parts that no engine or limit
    of memory changes."""
    kind = sequences.kinds[name]
    if kind == "categorical":
        return EventColumn(name, kind, len(sequences.vocabularies[name]))
    stored = np.memmap(event_file(folder, name, kind), STORED[kind], mode="r")
    count, total, squares = 0, 0.0, 0.0
    for step in ("mean", "std"):
        mean = total / max(count, 1)
        for part in chunks(len(stored)):
            values = stored[part][stored[part] != 0 if kind == "time" else ~np.isnan(stored[part])].astype(
                np.float64
            )
            if step == "mean":
                count, total = count + len(values), total + float(values.sum())
            else:
                squares += float(np.square(values - mean).sum())
    return EventColumn(name, kind, 0, total / max(count, 1), (squares / max(count, 1)) ** 0.5 or 1.0)


def _split_hashes(data_hash: str, has_timestamps: bool) -> dict[str, str]:
    """The hash of every split that the data allows, by its protocol."""
    protocols = [name for name in PROTOCOLS if name != "global_time" or has_timestamps]
    return {name: digests.split_hash(data_hash, name) for name in protocols}


def length_statistics(lengths: np.ndarray) -> dict[str, float]:
    """min, median, mean and max of ``lengths [U]``."""
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 4),
        "max": int(lengths.max()),
    }


def check_expected(raw: RawRatings, users: int, items: int) -> None:
    """UserError if the counts after preparation are not those that ``raw`` expects."""
    for what, expected, found in (("items", raw.expected_items, items), ("users", raw.expected_users, users)):
        if expected is not None and expected != found:
            counts = f"{found} {what} after preparation where {expected} are expected"
            raise UserError(f"{raw.name}: {counts}; is {raw.files[0]} the whole file?")


def summary(manifest: Manifest) -> str:
    """The table of counts, lengths and hashes that preparation prints."""
    rows = [f"{'':10}{'as read':>14}{'prepared':>14}"]
    for what in ("users", "items", "events"):
        rows.append(f"{what:10}{manifest.counts_before[what]:>14,}{manifest.counts[what]:>14,}")
    lengths = manifest.lengths
    rows += [
        f"users with one event (they train only): {manifest.counts['users_with_one_event']:,}",
        "events a user: min {min}, median {median:g}, mean {mean:g}, max {max}".format(**lengths),
        f"data hash:                 {manifest.data_hash}",
    ]
    rows += [f"{f'split hash, {name}:':26} {text}" for name, text in manifest.split_hashes.items()]
    if manifest.event_columns:
        kinds = (
            f"{each.name} ({each.kind}{f' of {each.cardinality:,}' * (each.kind == 'categorical')})"
            for each in manifest.event_columns
        )
        rows += [f"event columns: {', '.join(kinds)}", f"columns hash:              {manifest.columns_hash}"]
    return "\n".join(rows)
