"""Files of a prepared folder, written from sorted events: flat columns, tables of ids and features, and the
manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.data.feature_tables import align, unrated_items
from generative_recommenders.data.manifest import (
    OFFSETS,
    TABLES,
    UNRATED,
    Manifest,
    column_file,
    vocabulary_file,
    write_manifest,
)
from generative_recommenders.data.preparation.digests import EventDigests, split_hash
from generative_recommenders.data.preparation.event_store import chunks, write_numbers
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.schema import KNOWN, STORED, EventColumn, is_missing
from generative_recommenders.data.sources.download import file_digest
from generative_recommenders.data.splits import PROTOCOLS
from generative_recommenders.data.statistics import sequence_statistics
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

_TIED = "tied.bin"
"""Scratch file ``[E]`` bool: the event has the very time of its user's previous one, which seconds, as kept, cannot
tell."""


@dataclass(frozen=True)
class Sequences:
    """What a prepared folder says of its events, whichever engine sorts them.

    texts: ids of users ``[U]`` and items ``[V]``, and categories that kept events have, by column: large_string, UTF-8
    order.
    offsets: ``[U + 1]`` int64. kinds: of all columns but the user, in their order. before: counts as read. dropped:
    events that ``--duplicates`` left out. recorded: what makes their order reproducible, see `Manifest.choices`.
    """

    texts: dict[str, pa.Array]
    offsets: np.ndarray
    kinds: dict[str, str]
    before: dict[str, int]
    dropped: int
    recorded: dict[str, str] = field(default_factory=dict)


Bucket: TypeAlias = dict[str, np.ndarray]
"""Sorted events, ``[n]`` by column as in `event_store.Events`, with places in `Sequences.texts` for codes."""


def write_folder(
    folder: Path, raw: RawRatings, sequences: Sequences, buckets: Iterable[Bucket], ticks_per_second: int
) -> Manifest:
    """Write all files; UserError if the counts are not those that ``raw`` expects. buckets: all events, sorted."""
    for what, expected in (("item", raw.expected_items), ("user", raw.expected_users)):
        found = len(sequences.texts[what])
        if raw.duplicates == "keep" and expected not in (None, found):
            counts = f"{found} {what}s after preparation where {expected} are expected"
            raise UserError(f"{raw.name}: {counts}; is {raw.files[0]} the whole file?")
    hashes = _write_columns(folder, sequences, buckets, ticks_per_second)
    return _write_tables(folder, raw, sequences, hashes)


def _write_columns(
    folder: Path, sequences: Sequences, buckets: Iterable[Bucket], ticks_per_second: int
) -> tuple[str, str]:
    """Write the flat columns, times in seconds; returns `EventDigests.hashes`."""
    digests = EventDigests(sequences.texts, sequences.kinds)
    paths = {name: column_file(folder, name, kind) for name, kind in sequences.kinds.items()}
    if "timestamp" in paths:
        paths[_TIED] = folder / _TIED
    with ExitStack() as opened:
        files = {name: opened.enter_context(path.open("wb")) for name, path in paths.items()}
        done, last = 0, (-1, -1)
        for bucket in buckets:
            users, stored = bucket["user"], {}
            for name, kind in sequences.kinds.items():
                values = bucket[name]
                if kind == "categorical":
                    values = values + 1
                elif kind == "time":
                    values = values // ticks_per_second
                stored[name] = np.asarray(values, STORED[kind])
                write_numbers(files[name], stored[name])
            digests.add(users, np.arange(done, done + len(users)) - sequences.offsets[users], stored)
            if (ticks := bucket.get("timestamp")) is not None:
                first = last == (users[0], ticks[0])
                tied = np.append(first, (ticks[1:] == ticks[:-1]) & (users[1:] == users[:-1]))
                write_numbers(files[_TIED], tied)
                last = (users[-1], ticks[-1])
            done += len(users)
    with (folder / OFFSETS).open("wb") as file:
        write_numbers(file, sequences.offsets.astype("<i8"))
    return digests.hashes()


def _write_tables(folder: Path, raw: RawRatings, sequences: Sequences, hashes: tuple[str, str]) -> Manifest:
    """Write the Parquet tables of ids, features and vocabularies, and the manifest with its statistics."""
    users, user_specs = align("user", sequences.texts["user"], raw.user_features)
    items, item_specs = align("item", sequences.texts["item"], raw.item_features)
    tables, (counts, lengths) = dict(zip(TABLES, (items, users))), _sizes(sequences)
    if raw.item_features is not None and raw.filter == "none":
        tables[UNRATED] = unrated_items(sequences.texts["item"], raw.item_features)
        counts["unrated_items"] = len(tables[UNRATED])
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    extra = [name for name in sequences.kinds if name not in KNOWN]
    for name in (name for name in extra if sequences.kinds[name] == "categorical"):
        pq.write_table(pa.table({name: sequences.texts[name]}), vocabulary_file(folder, name))
    has_timestamps = "timestamp" in sequences.kinds
    manifest = Manifest(
        name=raw.name,
        counts_before=sequences.before,
        counts=counts,
        lengths=lengths,
        has_ratings="rating" in sequences.kinds,
        has_timestamps=has_timestamps,
        data_hash=hashes[0],
        filter=raw.filter,
        features=item_specs + user_specs,
        source=raw.source,
        event_columns=[_describe(folder, sequences, name) for name in extra],
        columns_hash=hashes[1],
        tables={name: file_digest(folder / name, "sha256") for name in tables},
        split_hashes={
            name: split_hash(hashes[0], name) for name in PROTOCOLS if name != "global_time" or has_timestamps
        },
        choices={"tie_order": raw.tie_order, "duplicates": raw.duplicates, **sequences.recorded},
    )
    write_manifest(folder, manifest)
    # The folder can be opened now, from which the statistics are counted.
    tied = np.memmap(folder / _TIED, np.bool_, "r") if has_timestamps else None
    statistics = sequence_statistics(SequenceDataset.open(folder), tied)
    (folder / _TIED).unlink(missing_ok=True)
    manifest = replace(manifest, statistics={"dropped_duplicates": sequences.dropped, **statistics})
    write_manifest(folder, manifest)
    return manifest


def _sizes(sequences: Sequences) -> tuple[dict[str, int], dict[str, float]]:
    """Counts, and lengths of the users' sequences, as the manifest has them."""
    lengths = np.diff(sequences.offsets)
    counts = {
        "users": len(lengths),
        "items": len(sequences.texts["item"]),
        "events": int(sequences.offsets[-1]),
        "users_with_one_event": int((lengths == 1).sum()),
    }
    return counts, {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 4),
        "max": int(lengths.max()),
    }


def _describe(folder: Path, sequences: Sequences, name: str) -> EventColumn:
    """A further column as the manifest has it. Its mean and deviation are taken from the file, in parts that no engine
    or limit of memory changes."""
    kind = sequences.kinds[name]
    if kind == "categorical":
        return EventColumn(name, kind, len(sequences.texts[name]))
    stored = np.memmap(column_file(folder, name, kind), STORED[kind], mode="r")

    def total(number: Callable[[np.ndarray], np.ndarray]) -> float:
        parts = (stored[part] for part in chunks(len(stored)))
        there = (values[~is_missing(name, values)].astype(np.float64) for values in parts)
        return sum(float(number(values).sum()) for values in there)

    # Pass after pass: the difference of the mean square and the squared mean would lose a timestamp's deviation to
    # rounding.
    count = max(total(np.ones_like), 1)
    mean = total(np.asarray) / count
    deviation = (total(lambda values: np.square(values - mean)) / count) ** 0.5
    return EventColumn(name, kind, 0, mean, deviation or 1.0)
