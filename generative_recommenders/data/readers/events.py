"""Events of raw files: what is read as what, said before the work begins, and typed batches of the columns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from absl import logging

from generative_recommenders.data.readers import times, values
from generative_recommenders.data.readers.files import EmptyFileError
from generative_recommenders.data.readers.layout import Column, Requests, find_columns, parse_columns
from generative_recommenders.data.readers.sources import open_source
from generative_recommenders.data.readers.tables import TableSource
from generative_recommenders.data.readers.times import TimeFormat
from generative_recommenders.data.schema import KINDS, KNOWN
from generative_recommenders.errors import UserError

SHOWN_EVENTS = 3


@dataclass(frozen=True)
class ReadOptions:
    """Options of raw files, as the user gives them; None is found out.

    columns: ``--columns``, by the header where None. delimiter, quoting, header (whether line 1 names the columns): of
    text.
    time_unit: of numeric times ("s", "ms", "us", "ns"). drop_missing: events without a user or an item are left out and
    counted; otherwise they are a fault. exchange: a line is a user's sequence in the exchange format.
    """

    columns: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    quoting: str = "auto"
    time_unit: str | None = None
    drop_missing: bool = False
    exchange: bool = False

    @property
    def requests(self) -> Requests | None:
        """The entries of ``--columns``."""
        return None if self.columns is None else parse_columns(self.columns)


@dataclass(frozen=True)
class RawRatings:
    """Events before preparation, with what is known about them.

    files: delimited text, JSON lines, Parquet or Arrow IPC; several are read in order and have the same columns.
    filter: ``amazon_five``, ``none`` or ``k_core:K``. tie_order, duplicates: see `preparation.order`.
    item_features: column ``item`` (original ids, string) and feature columns: string = categorical, list of
        strings = categorical list, float or integer = numerical. user_features likewise with ``user``.
    expected_items, expected_users: counts after preparation; checked when given.
    source: description that the manifest keeps (JSON-able; checksums).
    """

    name: str
    files: list[Path]
    options: ReadOptions = field(default_factory=ReadOptions)
    filter: str = "none"
    tie_order: str = "file"
    duplicates: str = "keep"
    item_features: pa.Table | None = None
    user_features: pa.Table | None = None
    expected_items: int | None = None
    expected_users: int | None = None
    source: dict[str, Any] = field(default_factory=dict)


def _no_time(path: Path, column: Column, sample: pl.Series) -> UserError:
    """The error of a column of times whose first rows are of no known format."""
    there = sample.is_not_null()
    if sample.dtype == pl.String:
        there &= ~sample.str.strip_chars().is_in(times.MISSING)
    row = values.first_true(there)
    if row is None:
        return UserError(
            f"{path}: the first {len(sample)} rows have no {column.name}, so that its format cannot be told; put a row "
            "that has one among them, or leave the column out of --columns"
        )
    return UserError(
        f"{path}: the {column.name} {str(sample[row])[:40]!r} (row {row + 1}) is no time; times are numbers since 1970 "
        "or ISO 8601, as 2023-05-31 14:05: write them so, or name another column in --columns"
    )


class EventReader:
    """The events of raw files. Layout and formats of time are those of the first file that holds an event; the others
    must have the same.

    columns: what is read, user and item first. UserError: no header and no ``--columns``, no user or item, a column
    that may be the time and is not used, times of no known format.
    """

    def __init__(self, files: list[Path], options: ReadOptions) -> None:
        self.files, self.options = files, options
        self.first = first = self._first_source()
        order = {name: place for place, name in enumerate(KNOWN)}
        columns = find_columns(first, options.requests)
        self.columns = sorted(columns, key=lambda each: order.get(each.name, len(order)))
        self.time_formats: dict[str, TimeFormat] = {}
        for column in self.columns:
            if column.kind != "time":
                continue
            sample = first.sample[str(column.place)]
            form = times.recognise(sample, options.time_unit)
            if form is None:
                next(iter(first.batches([column])), None)  # tells a column of lists, which the sample leaves out
                raise _no_time(first.path, column, sample)
            self.time_formats[column.name] = form
        if options.time_unit and not options.exchange and not any(each.unit for each in self.time_formats.values()):
            what = "its times are no numbers" if self.time_formats else "no times are read"
            raise UserError(f"{first.path}: {what}: leave --time_unit={options.time_unit} out")
        self.dropped = 0
        self._first_missing = ""
        self._log(first)

    def _first_source(self) -> TableSource:
        """The first file that holds an event."""
        for path in self.files:
            with suppress(EmptyFileError):
                source = open_source(path, self.options)
                if len(source.sample):
                    return source
                columns = find_columns(source, self.options.requests)
                deque(source.batches(columns), maxlen=0)  # where no line is like the first one, its fault is told
        raise EmptyFileError(self.files[0])

    def _log(self, source: TableSource) -> None:
        shown = [
            str(column) + (f" ({self.time_formats[column.name]})" if column.kind == "time" else "")
            for column in self.columns
        ]
        logging.info("%s: %s", source.path, ", ".join(shown))
        used = {column.place for column in self.columns}
        if rest := [name for place, name in enumerate(source.header or ()) if place not in used]:
            logging.info("%s: columns left out: %s", source.path, ", ".join(rest)[:200])
        cells = []
        for column in self.columns:
            first = source.sample[str(column.place)].head(SHOWN_EVENTS)
            if column.kind == "time":  # as a number where it is none of the format: Python may not be able to show it
                found = times.to_nanoseconds(first, self.time_formats[column.name]).cast(pl.Datetime("ns", "UTC"))
                first = found.dt.strftime("%F %T%.3f%:z").fill_null(first.to_physical().cast(pl.String))
            cells.append([f"{column.name} {str(value)[:40]!r}" for value in first])
        for number, event in enumerate(zip(*cells), 1):
            logging.info("event %d: %s", number, ", ".join(event))

    def batches(self) -> Iterator[pa.Table]:
        """The events in (file, row) order, a bounded number at a time.

        Columns: ``user``, ``item`` large_string, ``rating`` float32, ``timestamp`` int64 nanoseconds since 1970;
        further ones by kind, null where missing: large_string for categories, float32 for numbers, int64 nanoseconds
        for times.
        UserError: the first value that is none, with file and line; missing ids, with their number, at the end.
        """
        kept = 0
        for path in self.files:
            for table in self.file_batches(path):
                kept += table.num_rows
                yield table
        self.check_missing(kept)

    def file_batches(self, path: Path) -> Iterator[pa.Table]:
        """The events of one of the files, see `batches`; of an empty one beside others none, with a warning."""
        try:
            yield from self._events_of(path)
        except EmptyFileError as empty:
            if len(self.files) == 1:
                raise
            logging.warning("%s", empty)

    def _events_of(self, path: Path) -> Iterator[pa.Table]:
        columns, source = self.columns, self.first
        if path != self.first.path:
            source = open_source(path, self.options)
            mine = {column.name: column for column in find_columns(source, self.options.requests)}
            if {each.name: each.header for each in mine.values()} != {each.name: each.header for each in columns}:
                found, expected = (", ".join(map(str, each)) for each in (mine.values(), columns))
                raise UserError(
                    f"{path}: it has {found}; {self.first.path} has {expected}; all files must have the same"
                )
            columns = [mine[column.name] for column in columns]
            # Numbers in another unit would be read as other times.
            for name, form in self.time_formats.items():
                own = times.recognise(source.sample[str(mine[name].place)], self.options.time_unit)
                if form.unit is not None and own not in (None, form, TimeFormat()):
                    raise UserError(
                        f"{path}: the {name} is in {own}; {self.first.path} has {form}; all files must have the same"
                    )
        read = 0
        for rows, frame in source.batches(columns):
            read += len(frame)
            yield self._typed(rows, frame)
        if not read:
            raise EmptyFileError(path)

    def check_missing(self, kept: int | None = None) -> None:
        """UserError if the files read so far have events without a user or an item, unless these are to be dropped.
        kept: the other events, once all files are read, of which there must be some."""
        if self.dropped and not self.options.drop_missing:
            raise UserError(
                f"{self._first_missing}, and {self.dropped} events in all lack a user or an item; --drop_missing "
                "leaves them out"
            )
        if self.dropped:
            logging.warning("%d events without a user or an item are left out", self.dropped)
        if kept == 0:
            raise UserError(f"{self.first.path}: every event lacks a user or an item: nothing is left to prepare")

    def _typed(self, rows: values.Rows, frame: pl.DataFrame) -> pa.Table:
        typed: dict[str, pl.Series] = {}
        missing = pl.repeat(False, len(frame), eager=True)
        ids, others = self.columns[:2], self.columns[2:]
        for column in ids:
            raw = frame[column.name]
            typed[column.name], absent = values.ids(raw, column.name, rows)
            missing |= absent
            if not self._first_missing and (at := values.first_true(absent)) is not None:
                self._first_missing = str(rows.fault(at, column.name, raw[at], "is missing"))
        if count := int(missing.sum()):  # nothing else in such a row is a fault: it may be empty
            self.dropped += count
            kept, place_of = missing.not_().arg_true(), rows.place_of
            typed = {name: each.gather(kept) for name, each in typed.items()}
            frame, rows = frame[kept], values.Rows(rows.file, lambda row: place_of(int(kept[row])))
        for column in others:
            raw = frame[column.name]
            if column.kind == "numerical":
                typed[column.name] = values.numbers(raw, column.name, rows, optional=column.name != "rating")
            elif column.kind == "time":
                form = self.time_formats[column.name]
                typed[column.name] = values.times(raw, column.name, form, rows, optional=column.name != "timestamp")
            else:
                typed[column.name] = values.categories(raw, column.name, rows)
        return pl.DataFrame([each.alias(name) for name, each in typed.items()]).to_arrow().cast(self.schema)

    @property
    def kinds(self) -> dict[str, str]:
        """Of all columns but the user, as a prepared folder has them; items are categories."""
        return {each.name: "categorical" if each.kind == "id" else each.kind for each in self.columns[1:]}

    @property
    def schema(self) -> pa.Schema:
        """Of the batches."""
        return pa.schema([("user", pa.large_string()), *((name, KINDS[kind]) for name, kind in self.kinds.items())])
