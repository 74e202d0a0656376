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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from generative_recommenders.config.registry import DATA_SOURCES
from generative_recommenders.data.manifest import FILE_NAME, Manifest
from generative_recommenders.data.preparation import order
from generative_recommenders.data.preparation.columns import Bucket, Sequences, write_folder
from generative_recommenders.data.preparation.event_store import (
    BYTES_PER_EVENT,
    CHUNK_EVENTS,
    Events,
    chunks,
    collect_events,
)
from generative_recommenders.data.preparation.folder import new_folder
from generative_recommenders.data.readers.events import EventReader, RawRatings
from generative_recommenders.data.readers.times import NANOSECONDS
from generative_recommenders.data.schema import check_names
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
    # without the folders, of hidden names, that are being written
    return sorted(each.parent.name for each in (data_root / "prepared").glob(f"[!.]*/{FILE_NAME}"))


def find_prepared(name: str, data_root: Path) -> Path:
    """The folder of a prepared data set, given by its name or as a path; UserError with what there is, and the command
    that prepares this one: published data by their name, others from a file.

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
            "enlarge ML-20M by the fractal expansion of the HSTU authors' program (run_fractal_expansion.py, 16 x 32), "
            f"write its ratings as user,item,rating,timestamp in one file or folder, and {command}"
        )
    if data_root != Path("data"):
        command += f" --data_root={data_root}"
    raise UserError(
        f"{name} is not prepared in {folder}{meant}; prepared: {', '.join(prepared) or 'none'}. To prepare it: "
        f"{command}"
    )


def prepare(raw: RawRatings, out_dir: str | Path, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> Manifest:
    """Prepare ``raw`` into the folder ``out_dir`` (replaced only on success) and return its manifest.

    memory_limit: bytes that events may take; beyond it they are kept in files beside the target. The distinct
    ids must fit in memory in any case. Raises UserError for bad input and for counts other than the expected
    ones.
    """
    return prepare_batches(raw, open_reader(raw).batches(), Path(out_dir), memory_limit, NANOSECONDS["s"])


def open_reader(raw: RawRatings) -> EventReader:
    """The reader of the raw files; UserError where their columns or the choices cannot be."""
    order.parse_filter(raw.filter)
    reader = EventReader(raw.files, raw.options)
    order.check_choices(raw.tie_order, raw.duplicates, "timestamp" in reader.kinds)
    check_names(reader.kinds)
    return reader


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
            ties, kept = order.order_raw(events, raw.tie_order, raw.duplicates, ticks_per_second, bucket_events)
            dropped = 0 if kept is None else int(len(kept) - kept.sum())
            chosen = order.apply_filter(events, raw.filter, kept)
            recorded: dict[str, str] = {}
            if raw.tie_order == "published":
                ties, recorded = order.published_ranks(events, chosen.table)
            before = {f"{name}s": len(events.texts[name]) for name in ("user", "item")} | {"events": len(events)}
            texts, offsets = number_texts(events, chosen.events, chosen.items)
        sequences = Sequences(texts, offsets, events.kinds, before, dropped, recorded)
        with phase("sort and write"):
            buckets = sorted_buckets(events, offsets, ties, bucket_events)
            manifest = write_folder(folder, raw, sequences, buckets, ticks_per_second)
        shutil.rmtree(spill, ignore_errors=True)
    return manifest


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log the name of a phase and the time it took."""
    start = time.monotonic()
    logging.info("%s ...", name)
    yield
    logging.info("%s: %.1f s", name, time.monotonic() - start)


def number_texts(events: Events, kept: np.ndarray, kept_items: np.ndarray) -> tuple[dict[str, pa.Array], np.ndarray]:
    """`Sequences.texts` and ``offsets``. The codes of users, items and categories become places among the texts, -1 for
    what is not kept, and for the user of an event that is not.

    kept: ``[E]`` bool. kept_items: ``[raw items]`` bool.
    """
    texts, offsets = {}, np.zeros(1, np.int64)
    for name, every in events.texts.items():
        counts = kept_items if name == "item" else events.counts(name, kept)
        codes = np.flatnonzero(counts)
        codes = codes[pc.sort_indices(every.take(pa.array(codes))).to_numpy()]
        texts[name] = every.take(pa.array(codes))
        number = np.full(len(every) + 1, -1, np.int32)  # the last place is that of a missing value
        number[codes] = np.arange(len(codes), dtype=np.int32)
        column = events.columns[name]
        for part in chunks(len(events)):
            column[part] = number[column[part]]
            if name == "user":
                column[part][~kept[part]] = -1
        if name == "user":
            offsets = np.append(offsets, np.cumsum(counts[codes]))
    return texts, offsets


def sorted_buckets(
    events: Events, offsets: np.ndarray, ties: np.ndarray | None, bucket_events: int
) -> Iterator[Bucket]:
    """Yield all kept events by user and time, about ``bucket_events`` at a time (a user is never divided).

    offsets: of `number_texts`. ties: ``[raw events]`` what orders events of one time, None for their order in the
    files.
    """
    timestamps = events.columns.get("timestamp")
    for rows, users in order.user_buckets(events.columns["user"], offsets, bucket_events):
        times, tied = (None if keys is None else keys[rows] for keys in (timestamps, ties))
        sources = rows[order.chronological(users, times, tied)]
        yield {name: values[sources] for name, values in events.columns.items()}
