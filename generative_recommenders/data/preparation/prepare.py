"""Raw ratings to a prepared folder: collect, filter, number the ids, sort by time, write.

Internal ids follow the UTF-8 byte order of the original ids. Each user's ratings are sorted by time; ties,
and data without times, keep (file, row) order unless ``RawRatings.tie_order`` says otherwise. The result depends on the
input and the choices alone, not on the engine.
"""

from __future__ import annotations

import difflib
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from generative_recommenders.config.registry import DATA_SOURCES
from generative_recommenders.data.manifest import FILE_NAME, Manifest
from generative_recommenders.data.preparation import order
from generative_recommenders.data.preparation.columns import (
    Bucket,
    Sequences,
    check_expected,
    write_columns,
    write_tables,
)
from generative_recommenders.data.preparation.event_store import (
    BYTES_PER_EVENT,
    CHUNK_EVENTS,
    Events,
    chunks,
    collect_events,
)
from generative_recommenders.data.preparation.filters import apply_filter, parse_filter
from generative_recommenders.data.preparation.folder import new_folder
from generative_recommenders.data.readers.events import EventReader, RawRatings
from generative_recommenders.data.readers.times import NANOSECONDS
from generative_recommenders.data.schema import extra_kinds
from generative_recommenders.errors import UserError

SORT_BYTES_PER_EVENT = 120
"""Memory that one event of a bucket takes at most while it is sorted: gathered columns, sort keys and their order."""
DEFAULT_MEMORY_LIMIT = 4 << 30


def prepared_path(data_root: str | Path, name: str) -> Path:
    """Where the data set ``name`` lies below ``data_root`` when prepared; UserError for an odd name."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"the name {name!r} of a data set must consist of letters, digits and . _ + -")
    return Path(data_root) / "prepared" / name


def prepared_names(data_root: Path) -> list[str]:
    """Names of the data sets that are prepared below ``data_root``."""
    return sorted(each.parent.name for each in (data_root / "prepared").glob(f"*/{FILE_NAME}"))


def find_prepared(name: str, data_root: Path) -> Path:
    """The folder of a prepared data set, given by its name or as a path; UserError with what there is, and the command that
    prepares this one: published data by their name, others from a file.

    A path has a separator, or is a prepared folder while none below ``data_root`` has that name.
    """
    as_path = Path(name)
    if as_path.name != name:
        if not (as_path / FILE_NAME).is_file():
            raise UserError(f"{name} is no prepared data set: it has no {FILE_NAME}")
        return as_path
    folder = prepared_path(data_root, name)
    if folder.exists():
        return folder
    if (as_path / FILE_NAME).is_file():
        return as_path
    prepared = prepared_names(data_root)
    close = difflib.get_close_matches(name, prepared, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    command = f"python preprocess_public_data.py --dataset={name}"
    if name not in DATA_SOURCES:
        command = f"python preprocess_public_data.py --dataset=csv --raw_path=FILE --name={name}"
    if name == "ml-3b":
        command = (
            "enlarge ML-20M by the fractal expansion of the HSTU authors' program (run_fractal_expansion.py, 16 x 32), write "
            f"its ratings as user,item,rating,timestamp in one file or folder, and {command}"
        )
    if data_root != Path("data"):
        command += f" --data_root={data_root}"
    raise UserError(
        f"{name} is not prepared in {folder}{meant}; prepared: {', '.join(prepared) or 'none'}. To prepare it: {command}"
    )


def prepare(raw: RawRatings, out_dir: str | Path, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> Manifest:
    """Prepare ``raw`` into the folder ``out_dir`` (replaced only on success) and return its manifest.

    memory_limit: bytes that events may take; beyond it they are kept in files beside the target. The distinct
    ids must fit in memory in any case. Raises UserError for bad input and for counts other than the expected
    ones.
    """
    parse_filter(raw.filter)
    reader = EventReader(raw.files, raw.options)
    order.check_choices(raw.tie_order, raw.duplicates, "timestamp" in reader.schema.names)
    extra_kinds(reader.schema)
    return prepare_batches(raw, reader.batches(), Path(out_dir), memory_limit, NANOSECONDS["s"])


def prepare_batches(
    raw: RawRatings,
    batches: Iterable[pa.Table],
    out_dir: Path,
    memory_limit: int,
    ticks_per_second: int = 1,
) -> Manifest:
    """``prepare`` with the events given as tables (columns of ``EventReader.batches``).

    ticks_per_second: of their ``timestamp``; events are sorted by ticks and keep seconds.
    """
    bucket_events = max(1, min(memory_limit // SORT_BYTES_PER_EVENT, CHUNK_EVENTS))
    with new_folder(out_dir) as folder:
        spill = folder / "spill"
        with phase("read and number the ids"):
            # few long runs: ids that come back in another run are hashed again when runs are merged
            run_events = max(1, memory_limit // BYTES_PER_EVENT)
            events = collect_events(batches, run_events, spill)
        with phase("filter"):
            ties, kept = order.order_raw(
                events, raw.tie_order, raw.duplicates, ticks_per_second, bucket_events
            )
            dropped = 0 if kept is None else int(len(kept) - kept.sum())
            chosen = apply_filter(events, raw.filter, kept)
            choices = {"tie_order": raw.tie_order, "duplicates": raw.duplicates}
            if raw.tie_order == "published":
                ties, recorded = order.published_ranks(events, chosen.table)
                choices |= recorded
            sequences, selection = _select(events, chosen.events, chosen.items)
        if raw.duplicates == "keep":
            check_expected(raw, len(sequences.user_ids), len(sequences.item_ids))
        with phase("sort and write"):
            buckets = sorted_buckets(events, sequences, selection, ties, bucket_events)
            hashes = write_columns(folder, sequences, buckets, ticks_per_second)
        before = {"users": len(events.user_ids), "items": len(events.item_ids), "events": len(events)}
        manifest = write_tables(folder, raw, sequences, before, dropped, hashes, choices)
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
class Selection:
    """Which raw events are kept, and under which numbers.

    kept: ``[raw events]`` bool. user_number, item_number: ``[raw ids]`` int32, from an id's code to its place
    among the kept ones, -1 for dropped. value_number: likewise of the values of categorical columns, by name.
    """

    kept: np.ndarray
    user_number: np.ndarray
    item_number: np.ndarray
    value_number: dict[str, np.ndarray]


def _select(events: Events, kept: np.ndarray, kept_items: np.ndarray) -> tuple[Sequences, Selection]:
    lengths = np.zeros(len(events.user_ids), np.int64)
    kinds = {name: "numerical" if x.dtype.kind == "f" else "time" for name, x in events.extra.items()}
    kinds |= dict.fromkeys(events.vocabularies, "categorical")
    # one place more, which a missing value, -1, takes
    occurs = {name: np.zeros(len(values) + 1, bool) for name, values in events.vocabularies.items()}
    for part in chunks(len(events)):
        lengths += np.bincount(events.users[part][kept[part]], minlength=len(lengths))
        for name, found in occurs.items():
            found[events.extra[name][part][kept[part]]] = True
    user_ids, user_number = _number_ids(events.user_ids, lengths > 0)
    item_ids, item_number = _number_ids(events.item_ids, kept_items)
    numbered = {name: _number_ids(events.vocabularies[name], found[:-1]) for name, found in occurs.items()}
    ordered = np.zeros(len(user_ids), np.int64)
    ordered[user_number[user_number >= 0]] = lengths[user_number >= 0]
    offsets = np.concatenate([[0], np.cumsum(ordered)])
    has_ratings, has_timestamps = events.ratings is not None, events.timestamps is not None
    vocabularies = {name: values for name, (values, _) in numbered.items()}
    sequences = Sequences(user_ids, item_ids, offsets, has_ratings, has_timestamps, kinds, vocabularies)
    value_number = {name: number for name, (_, number) in numbered.items()}
    return sequences, Selection(kept, user_number, item_number, value_number)


def _number_ids(ids: pa.Array, keep: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """The kept ids in UTF-8 order, and for every code its place among them (-1: not kept)."""
    codes = np.flatnonzero(keep)
    kept = ids.take(pa.array(codes))
    places = pc.sort_indices(kept).to_numpy()
    number = np.full(len(ids), -1, np.int32)
    number[codes[places]] = np.arange(len(codes), dtype=np.int32)
    return kept.take(pa.array(places)), number


def sorted_buckets(
    events: Events, sequences: Sequences, selection: Selection, ties: np.ndarray | None, bucket_events: int
) -> Iterator[Bucket]:
    """Yield all kept events by user and time, about ``bucket_events`` at a time (a user is never divided).

    ties: ``[raw events]`` what orders events of one time, None for their order in the files.
    """
    numbers, kept = selection.user_number, selection.kept
    for rows, users in order.user_buckets(events.users, sequences.offsets, bucket_events, numbers, kept):
        times = None if events.timestamps is None else events.timestamps[rows]
        places = order.chronological(users, times, None if ties is None else ties[rows])
        sources = rows[places]
        extra = {name: values[sources] for name, values in events.extra.items()}
        for name, number in selection.value_number.items():
            extra[name] = np.append(number, np.int32(-1))[extra[name]] + 1
        yield Bucket(
            users[places],
            selection.item_number[events.items[sources]],
            None if events.ratings is None else events.ratings[sources],
            None if times is None else times[places],
            extra,
        )
