"""Raw files as tables of text or typed columns: delimited text and JSON lines here, Parquet and Arrow IPC in
`tables`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from generative_recommenders.data.readers import text
from generative_recommenders.data.readers.exchange import ExchangeSource
from generative_recommenders.data.readers.files import kind_of
from generative_recommenders.data.readers.layout import KNOWN_NAMES, has_known_names, is_named
from generative_recommenders.data.readers.tables import ArrowSource, ParquetSource, TableSource
from generative_recommenders.data.readers.times import MISSING
from generative_recommenders.data.readers.values import Rows, first_true
from generative_recommenders.errors import UserError, first_line

if TYPE_CHECKING:
    from generative_recommenders.data.readers.events import ReadOptions


def open_source(path: Path, options: ReadOptions) -> TableSource:
    """The file by its kind."""
    if options.exchange:
        return ExchangeSource(path)
    kind = kind_of(path)
    if kind == "text":
        return TextSource(path, options)
    for flag in ("delimiter", "header", "quoting"):
        if getattr(options, flag) != getattr(type(options), flag):
            raise UserError(f"{path}: --{flag} is for delimited text, and this is {kind}")
    if kind == "json":
        return JsonSource(path, options)
    return ParquetSource(path) if kind == "parquet" else ArrowSource(path)


class TextSource(TableSource):
    """Delimited text, gzip and zstd included."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        super().__init__(path)
        requests = options.requests  # which help to find the delimiter and the header
        lines, self.first_line = text.first_lines(path)
        self.dialect = find_dialect(path, lines, options)
        rows = [self.dialect.split(line) for line in lines]
        self.first_fields = rows[0]
        # A line of another number of fields is a fault, which is named with its number when the file is read.
        body = [row for row in rows[1:] if len(row) == len(rows[0])]
        if options.header is not None:
            has_header = options.header
        elif requests is None:
            has_header = has_known_names(rows[0])
        else:  # it has names that are asked for, or words above numbers
            places = [
                place
                for place, each in enumerate(requests[: len(rows[0])])
                if each and (each.name in ("rating", "timestamp") or each.kind in ("numerical", "time"))
            ]
            named = [rows[0][place].strip() for place in places]
            words = all(each not in MISSING and not _has_digit(each) for each in named)
            above_numbers = any(_has_digit(row[place]) for place in places for row in body[:1])
            has_header = is_named(requests, rows[0]) or (words and above_numbers)
        self.header = rows[0] if has_header else None
        if self.header is None:
            body = [rows[0], *body]
        names = [str(place) for place in range(len(rows[0]))]
        self.sample = pl.DataFrame(body, dict.fromkeys(names, pl.String), orient="row")

    def batches(self, columns):
        places = [column.place for column in columns]
        skip = self.first_line if self.header is not None else self.first_line - 1
        for whole in text.read_blocks(self.path, self.dialect.delimiter if self.dialect.quoting else None):
            block = whole.after_line(skip)
            if not block.data.strip(b" \t\n"):
                continue
            table = text.parse(self.path, block, self.dialect, self.sample.width, places)
            frame = pl.DataFrame(pl.from_arrow(table))
            frame.columns = [column.name for column in columns]
            yield text.rows_of(self.path, block, self.dialect), frame


def find_dialect(path: Path, lines: list[str], options: ReadOptions) -> text.Dialect:
    """The delimiter as given, or the only one that divides all first lines alike; UserError where several may be
    meant."""
    if options.delimiter is not None:
        mark = None if options.delimiter == " " else options.delimiter
        return text.Dialect(mark, _quotes(options, options.delimiter))
    tried = [each for each in text.DELIMITERS if options.quoting != "csv" or (each and len(each) == 1)]
    fitting: list[tuple[text.Dialect, list[str]]] = []
    for delimiter in tried:
        dialect = text.Dialect(delimiter, _quotes(options, delimiter))
        rows = [dialect.split(line) for line in lines]
        if len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            fitting.append((dialect, rows[0]))
    if not fitting:  # a faulty line: read by the delimiter of line 1, its fault is named later
        first = next((each for each in tried if each and each in lines[0]), None)
        return text.Dialect(first, _quotes(options, first))
    if len(fitting) > 1:
        # One that finds the columns, or as many as are asked for, or a mark rather than blanks.
        requests = options.requests
        if requests is None:
            better = [each for each in fitting if has_known_names(each[1])]
        else:
            better = [each for each in fitting if is_named(requests, each[1])]
            better = better or [each for each in fitting if len(each[1]) == len(requests)]
        fitting = better or fitting
        fitting = [each for each in fitting if each[0].delimiter is not None] or fitting
    if len(fitting) > 1:
        shown = " or ".join(f"{dialect} ({len(fields)} fields)" for dialect, fields in fitting)
        raise UserError(f"{path}: the delimiter may be {shown}; say which with --delimiter")
    return fitting[0][0]


def _quotes(options: ReadOptions, delimiter: str | None) -> bool:
    """RFC 4180 quotes are of CSV: one mark that is no tab or blank between the fields."""
    one = delimiter is not None and len(delimiter) == 1 and delimiter != " "
    if options.quoting == "csv" and not one:
        raise UserError("--quoting=csv needs a delimiter of one character; give it with --delimiter")
    return one and (options.quoting == "csv" or (options.quoting == "auto" and delimiter != "\t"))


class JsonSource(TableSource):
    """JSON lines, gzip and zstd included, values as text. A key that a line lacks is missing there."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        super().__init__(path)
        lines, self.first_line = text.first_lines(path)
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, self.first_line):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as fault:
                raise UserError(f"{path}, line {number}: not a JSON object: {first_line(fault)}") from fault
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object but {str(row)[:40]!r}")
            rows.append(row)
        self.header = list(dict.fromkeys(key for row in rows for key in row))
        # Refused where they are asked for; reviews have lists of images beside the columns of an event.
        self.nested = {key for row in rows for key, value in row.items() if isinstance(value, dict | list)}
        plain = _read_json(path, "\n".join(lines).encode(), self.first_line, self.header)
        self.sample = plain.with_columns(pl.lit(None).alias(name) for name in self.nested).rename(
            {name: str(place) for place, name in enumerate(self.header)}
        )
        known = [name for names in KNOWN_NAMES.values() for name in names.split() if name not in self.header]
        self.watched = known if options.requests is None else []
        """Known names that no first line has: one that comes later would be left out in silence."""

    def batches(self, columns):
        names = [column.header for column in columns]
        if nested := set(names) & self.nested:
            raise UserError(f"{self.path}: {min(nested)!r} is an object or list, which is no value of an event")
        for block in text.read_blocks(self.path):
            if not block.data.strip():
                continue
            rows = text.rows_of(self.path, block, text.Dialect(None, quoting=False))
            values = _read_json(self.path, block.data, block.first_line, [*names, *self.watched])
            for name in self.watched:
                if (row := first_true(values[name].is_not_null())) is not None:
                    raise UserError(
                        f"{self.path}, {rows.place_of(row)}: the key {name!r}, which none of the first "
                        f"{len(self.sample)} lines has; say what is read with --columns"
                    )
            for name in names:
                _refuse_misread(values[name], name, block, rows)
            yield rows, values.select(pl.col(column.header).alias(column.name) for column in columns)


def _read_json(path: Path, data: bytes, first: int, names: list[str]) -> pl.DataFrame:
    """The lines' values of ``names`` as text. first: number of the first line."""
    schema = dict.fromkeys(names, pl.String())
    try:
        return pl.read_ndjson(io.BytesIO(data), schema=schema)
    except pl.exceptions.PolarsError as error:
        for number, line in enumerate(data.split(b"\n"), first):
            try:
                if line.strip():
                    pl.read_ndjson(io.BytesIO(line), schema=schema)
            except pl.exceptions.PolarsError as fault:
                raise UserError(f"{path}, line {number}: not a JSON object: {first_line(fault)}") from error
        raise UserError(f"{path}, near line {first}: {first_line(error)}") from error


def _refuse_misread(values: pl.Series, name: str, block: text.Block, rows: Rows) -> None:
    """UserError for the first value that polars reads as another: objects and lists as text that looks so, half a
    surrogate pair as NUL, by which different texts would become one."""
    suspects = values.str.contains(r"^[\[{]|\x00").fill_null(False).arg_true()
    if not len(suspects):
        return
    lines = [line for line in block.data.split(b"\n") if line.strip()]
    for row in suspects.to_list():
        value = json.loads(lines[row]).get(name)
        if isinstance(value, dict | list):
            raise rows.fault(row, name, values[row], "is an object or list, which is no value of an event")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise rows.fault(row, name, values[row], "has half a surrogate pair, which is no text")


def _has_digit(field: str) -> bool:
    return any(character.isdigit() for character in field)
