"""The text format in which users of HSTU's public code exchange sequences.

A CSV with the header ``index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps``, one user a
line, oldest event first; the last three are quoted, comma-joined lists of equal length. Items and users are
written by their internal numbers (items 1..V, users 0-based). A data set without ratings or without
timestamps has zeros there, and a column that is zero throughout is read as absent.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.event_store import chunks
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.preparation.prepare import DEFAULT_MEMORY_LIMIT, prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.readers.text import Block, read_blocks
from generative_recommenders.data.readers.times import MAX_SECONDS
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

HEADER = ("index", "user_id", "sequence_item_ids", "sequence_ratings", "sequence_timestamps")
_LISTS = HEADER[2:]
USERS_AT_ONCE = 1 << 16
_MAX_LINE_BYTES = 1 << 28


def export_text(dataset: SequenceDataset, path: str | Path) -> None:
    """Write ``dataset`` to the file ``path``, through a temporary name beside it."""
    with new_file(Path(path)) as scratch, scratch.open("wb") as out:
        out.write((",".join(HEADER) + "\n").encode())
        for first in range(0, dataset.num_users, USERS_AT_ONCE):
            out.write(_export_users(dataset, first, min(first + USERS_AT_ONCE, dataset.num_users)))
    _say_losses(dataset, Path(path))


def _say_losses(dataset: SequenceDataset, path: Path) -> None:
    """Log what the format cannot hold."""
    for name, values in (("ratings", dataset.ratings), ("timestamps", dataset.timestamps)):
        if values is not None and not any(values[part].any() for part in chunks(len(values))):
            logging.warning("%s: all %s are zero; the exchange format reads that as none", path, name)
    if dataset.extra:
        logging.warning("%s: the exchange format leaves out %s", path, ", ".join(dataset.extra))
    seen = np.zeros(dataset.num_items + 1, bool)
    for part in chunks(dataset.num_events):
        seen[dataset.items[part]] = True
    lost = dataset.num_items - np.count_nonzero(seen)
    if lost:
        logging.warning("%s: %d items of the catalogue have no event and are not in it", path, lost)


def _export_users(dataset: SequenceDataset, first: int, last: int) -> bytes:
    bounds = np.asarray(dataset.offsets[first : last + 1])
    events = slice(int(bounds[0]), int(bounds[-1]))
    zeros = np.zeros(events.stop - events.start, np.int8)
    columns = [
        dataset.items[events],
        zeros if dataset.ratings is None else _as_floats(dataset.ratings[events]),
        zeros if dataset.timestamps is None else dataset.timestamps[events],
    ]
    lists = [_joined(bounds - bounds[0], values) for values in columns]
    numbers = pa.array(np.arange(first, last)).cast(pa.string())
    lines = pc.binary_join_element_wise(numbers, numbers, *lists, ",")
    return ("\n".join(lines.to_pylist()) + "\n").encode()


def _as_floats(values: np.ndarray) -> pa.Array:
    """Ratings as text, whole ones with ``.0`` as the published files have them."""
    texts = pa.array(np.asarray(values)).cast(pa.string())
    whole = pc.match_substring_regex(texts, r"^-?\d+$")
    return pc.if_else(whole, pc.binary_join_element_wise(texts, ".0", ""), texts)


def _joined(offsets: np.ndarray, values: np.ndarray | pa.Array) -> pa.Array:
    """Per user, the quoted and comma-joined values."""
    texts = values if isinstance(values, pa.Array) else pa.array(np.asarray(values)).cast(pa.string())
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts), ",")
    return pc.binary_join_element_wise('"', joined, '"', "")


def import_text(
    path: str | Path,
    out_dir: str | Path,
    name: str,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    k_core: int | None = None,
    tie_order: str = "file",
    duplicates: str = "keep",
) -> Manifest:
    """Prepare the folder ``out_dir`` from an exchange file; its numbers become the original ids.

    memory_limit: see ``prepare``. k_core: filter iteratively until every user and item has this many events. tie_order,
    duplicates: see `preparation.order`.
    Raises UserError with the line of the first fault: a wrong header, lists of unequal length, anything not a
    number.
    """
    path = Path(path)
    if k_core is not None and k_core < 1:
        raise UserError(f"--k_core={k_core} must be at least 1")
    absent = _unused_columns(path)
    raw = RawRatings(
        name,
        [path],
        filter="none" if k_core is None else f"k_core:{k_core}",
        tie_order=tie_order,
        duplicates=duplicates,
        source={"dataset": "exchange text", "input": path.name},
    )
    batches = (table.drop_columns(absent) for table in read_text(path))
    return prepare_batches(raw, batches, Path(out_dir), memory_limit)


def _unused_columns(path: Path) -> list[str]:
    """Which of ``rating`` and ``timestamp`` are zero throughout; reads until neither can be."""
    unused: list[str] | None = None
    for table in read_text(path):
        unused = [
            column
            for column in (["rating", "timestamp"] if unused is None else unused)
            if not pc.any(pc.not_equal(table[column], 0)).as_py()
        ]
        if not unused:
            break
    if unused is None:
        raise UserError(f"{path}: the file is empty: it holds no user")
    return unused


def read_text(path: Path) -> Iterator[pa.Table]:
    """Yield the events of an exchange file: ``user``, ``item``, ``rating``, ``timestamp``; UserError for
    bad lines."""
    for block in read_blocks(path, quoting=False, max_line_bytes=_MAX_LINE_BYTES):
        body = _without_header(path, block) if block.first_line == 1 else block
        if body.data.strip():
            yield _parse_block(path, body)


def _without_header(path: Path, block: Block) -> Block:
    header, _, body = block.data.partition(b"\n")
    expected = ",".join(HEADER)
    if header.replace(b'"', b"").strip() != expected.encode():
        raise UserError(f"{path}, line 1: not the exchange format, whose header is {expected}")
    return Block(body, 2)


def _parse_block(path: Path, block: Block) -> pa.Table:
    try:
        frame = pl.read_csv(io.BytesIO(block.data), has_header=False, schema=dict.fromkeys(HEADER, pl.String))
        lists = frame.select(pl.col(column).str.split(",") for column in _LISTS)
        lines = block.data.count(b"\n") + (not block.data.endswith(b"\n"))
        events = _explode(frame["user_id"], lists) if frame.height == lines else None
    except pl.exceptions.PolarsError:
        events = None
    if events is None:
        return _parse_strictly(path, block)
    return events.to_arrow().cast(_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("user", pa.large_string()),
        ("item", pa.large_string()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),
    ]
)


def _explode(users: pl.Series, lists: pl.DataFrame) -> pl.DataFrame | None:
    """One row an event, or None if any value is missing or out of range or lists differ in length."""
    lengths = lists.select(pl.all().list.len())
    items, ratings, times = lists.get_columns()
    if (
        users.null_count()
        or sum(lists.null_count().row(0))
        or any((lengths[:, 0] != lengths[:, i]).any() for i in (1, 2))
    ):
        return None
    events = pl.DataFrame(
        {
            "user": users.gather(np.repeat(np.arange(len(users)), lengths[:, 0].to_numpy())),
            "item": items.explode().cast(pl.Int64),
            "rating": ratings.explode().cast(pl.Float32),
            "timestamp": times.explode().cast(pl.Int64),
        }
    )
    good = (
        (pl.col("item") >= 0) & pl.col("rating").is_finite() & pl.col("timestamp").is_between(0, MAX_SECONDS)
    )
    if not events.select(good.fill_null(False).all()).item():
        return None
    return events.with_columns(pl.col("item").cast(pl.String))


def _parse_strictly(path: Path, block: Block) -> pa.Table:
    """Line by line: the rows, or UserError with the number of the first bad line."""
    rows: list[dict[str, Any]] = []
    try:
        lines = block.data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = block.first_line + block.data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: not UTF-8 text") from error
    for number, line in enumerate(lines, block.first_line):
        try:
            if line.strip():
                rows += _parse_line(line)
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return pa.Table.from_pylist(rows, _SCHEMA)


def _parse_line(line: str) -> list[dict[str, Any]]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    fields = next(csv.reader([line], strict=True))
    if len(fields) != len(HEADER):
        raise ValueError(f"{len(fields)} fields where {len(HEADER)} are expected")
    if not fields[1]:
        raise ValueError("the user is empty")
    items, ratings, times = (field.split(",") for field in fields[2:])
    if not len(items) == len(ratings) == len(times):
        raise ValueError(f"the lists have {len(items)}, {len(ratings)} and {len(times)} entries")
    return [
        {
            "user": fields[1],
            "item": _item(item),
            "rating": _number("rating", rating),
            "timestamp": _seconds(time),
        }
        for item, rating, time in zip(items, ratings, times)
    ]


def _item(text: str) -> str:
    if not (text.strip().isascii() and text.strip().isdecimal()):
        raise ValueError(f"the item id {text[:40]!r} is not a whole number")
    return str(int(text))


def _number(what: str, text: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"the {what} {text[:40]!r} is not a finite number")
    return value


def _seconds(text: str) -> int:
    value = _number("timestamp", text)
    if not 0 <= value <= MAX_SECONDS or value != int(value):
        raise ValueError(f"the timestamp {text[:40]!r} is not a whole number of seconds from 1970 to 2200")
    return int(value)
