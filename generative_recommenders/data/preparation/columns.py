"""Files of a prepared folder, written from sorted events: flat columns, tables of ids and features, and the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.data.feature_tables import align, unrated_items
from generative_recommenders.data.manifest import (
    COLUMNS,
    TABLES,
    UNRATED,
    Manifest,
    column_file,
    event_file,
    vocabulary_file,
    write_manifest,
)
from generative_recommenders.data.preparation.digests import EventDigests, split_hash
from generative_recommenders.data.preparation.event_store import chunks, write_numbers
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.schema import STORED, EventColumn
from generative_recommenders.data.sources.download import file_digest
from generative_recommenders.data.splits import PROTOCOLS
from generative_recommenders.data.statistics import sequence_statistics
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

_TIED = "tied.bin"
"""Scratch file ``[E]`` bool: the event has the very time of its user's previous one, which seconds, as kept, cannot tell."""


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


class Bucket(NamedTuple):
    """Sorted events ``[n]``. users, items: int32, from 0. ratings: float32 or None. timestamps: int64 ticks or None. extra:
    further columns as stored, times in ticks."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None
    timestamps: np.ndarray | None
    extra: dict[str, np.ndarray]


def write_columns(
    folder: Path, sequences: Sequences, buckets: Iterable[Bucket], ticks_per_second: int
) -> tuple[str, str]:
    """Write the flat columns, times in seconds; returns `EventDigests.hashes`."""
    digests = EventDigests(sequences.user_ids, sequences.item_ids, sequences.kinds, sequences.vocabularies)
    names = ["items"] + ["ratings"] * sequences.has_ratings + ["timestamps"] * sequences.has_timestamps
    files = {name: column_file(folder, name).open("wb") for name in names}
    files |= {name: event_file(folder, name, kind).open("wb") for name, kind in sequences.kinds.items()}
    if sequences.has_timestamps:
        files[_TIED] = (folder / _TIED).open("wb")
    try:
        done, last = 0, (-1, -1)
        for users, items, ratings, ticks, extra in buckets:
            seconds = None if ticks is None else ticks // ticks_per_second
            positions = np.arange(done, done + len(users)) - sequences.offsets[users]
            for name, values in (("items", items + 1), ("ratings", ratings), ("timestamps", seconds)):
                if values is not None:
                    write_numbers(files[name], values.astype(COLUMNS[name], copy=False))
            stored = {}
            for name, kind in sequences.kinds.items():
                scale = ticks_per_second if kind == "time" else 1
                stored[name] = np.asarray(extra[name] // scale if scale > 1 else extra[name], STORED[kind])
                write_numbers(files[name], stored[name])
            digests.add(users, items, ratings, seconds, positions, stored)
            if ticks is not None:
                tied = np.concatenate(
                    [
                        [last == (users[0], ticks[0])],
                        (ticks[1:] == ticks[:-1]) & (users[1:] == users[:-1]),
                    ]
                )
                write_numbers(files[_TIED], tied)
                last = (users[-1], ticks[-1])
            done += len(users)
    finally:
        for file in files.values():
            file.close()
    with column_file(folder, "offsets").open("wb") as file:
        write_numbers(file, sequences.offsets.astype(COLUMNS["offsets"]))
    return digests.hashes()


def write_tables(
    folder: Path,
    raw: RawRatings,
    sequences: Sequences,
    before: dict[str, int],
    dropped: int,
    hashes: tuple[str, str],
    choices: dict[str, str],
) -> Manifest:
    """Write the Parquet tables of ids, features and vocabularies, and the manifest with its statistics.

    before: counts as read. dropped: events that ``--duplicates`` left out. hashes: of `write_columns`. choices: how events were
    ordered, see `Manifest`.
    """
    users, user_specs = align("user", sequences.user_ids, raw.user_features)
    items, item_specs = align("item", sequences.item_ids, raw.item_features)
    tables, (counts, lengths) = dict(zip(TABLES, (items, users))), _sizes(sequences)
    if raw.item_features is not None and raw.filter == "none":
        tables[UNRATED] = unrated_items(sequences.item_ids, raw.item_features)
        counts["unrated_items"] = len(tables[UNRATED])
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    for name, values in sequences.vocabularies.items():
        pq.write_table(pa.table({name: values}), vocabulary_file(folder, name))
    manifest = Manifest(
        name=raw.name,
        counts_before=before,
        counts=counts,
        lengths=lengths,
        has_ratings=sequences.has_ratings,
        has_timestamps=sequences.has_timestamps,
        data_hash=hashes[0],
        filter=raw.filter,
        features=item_specs + user_specs,
        source=raw.source,
        event_columns=[_describe(folder, sequences, name) for name in sequences.kinds],
        columns_hash=hashes[1],
        tables={name: file_digest(folder / name, "sha256") for name in tables},
        split_hashes={
            name: split_hash(hashes[0], name)
            for name in PROTOCOLS
            if name != "global_time" or sequences.has_timestamps
        },
        choices=choices,
    )
    write_manifest(
        folder, manifest
    )  # so that the folder can be opened, from which the statistics are counted
    tied = np.memmap(folder / _TIED, np.bool_, "r") if sequences.has_timestamps else None
    statistics = sequence_statistics(SequenceDataset.open(folder), tied)
    (folder / _TIED).unlink(missing_ok=True)
    manifest = replace(manifest, statistics={"dropped_duplicates": dropped, **statistics})
    write_manifest(folder, manifest)
    return manifest


def _sizes(sequences: Sequences) -> tuple[dict[str, int], dict[str, float]]:
    """Counts, and lengths of the users' sequences, as the manifest has them."""
    lengths = np.diff(sequences.offsets)
    counts = {
        "users": len(lengths),
        "items": len(sequences.item_ids),
        "events": sequences.num_events,
        "users_with_one_event": int((lengths == 1).sum()),
    }
    return counts, {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 4),
        "max": int(lengths.max()),
    }


def _describe(folder: Path, sequences: Sequences, name: str) -> EventColumn:
    """A further column as the manifest has it. Its mean and deviation are taken from the file, in parts that no engine or limit
    of memory changes."""
    kind = sequences.kinds[name]
    if kind == "categorical":
        return EventColumn(name, kind, len(sequences.vocabularies[name]))
    stored = np.memmap(event_file(folder, name, kind), STORED[kind], mode="r")
    # In two passes: the difference of the mean square and the squared mean would lose a timestamp's deviation to rounding.
    count, total, squares = 0, 0.0, 0.0
    for step in ("mean", "std"):
        mean = total / max(count, 1)
        for part in chunks(len(stored)):
            values = stored[part]
            values = values[values != 0 if kind == "time" else ~np.isnan(values)].astype(np.float64)
            if step == "mean":
                count, total = count + len(values), total + float(values.sum())
            else:
                squares += float(np.square(values - mean).sum())
    return EventColumn(name, kind, 0, total / max(count, 1), (squares / max(count, 1)) ** 0.5 or 1.0)


def check_expected(raw: RawRatings, users: int, items: int) -> None:
    """UserError if the counts after preparation are not those that ``raw`` expects."""
    for what, expected, found in (("items", raw.expected_items, items), ("users", raw.expected_users, users)):
        if expected is not None and expected != found:
            counts = f"{found} {what} after preparation where {expected} are expected"
            raise UserError(f"{raw.name}: {counts}; is {raw.files[0]} the whole file?")
