"""Raw files as tables of text or typed columns: delimited text, JSON lines, Parquet and Arrow IPC."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from generative_recommenders.data.readers import text
from generative_recommenders.data.readers.files import first_bytes, is_packed, kind_of, open_unpacked
from generative_recommenders.data.readers.layout import ColumnRequest, has_known_names, is_named
from generative_recommenders.data.readers.values import MAX_ID_BYTES, Rows
from generative_recommenders.errors import UserError

SAMPLE_ROWS = 100
GZIP_FACTOR = 4
_BATCH_BYTES = 64 << 20
"""Values of a Parquet batch are read within about so many bytes."""
MOST_UNPACKED, SMALL_BYTES = 100, 256 << 20
"""A table that unpacks to more than so many times its own size, and is not small, is no table of events."""


class TableSource(ABC):
    """One raw file. header: names of its columns, or None where line 1 is data. sample: its first rows, all columns."""

    header: list[str] | None
    num_fields: int
    sample: pl.DataFrame

    def __init__(self, path: Path) -> None:
        self.path = path

    def estimated_rows(self) -> int:
        """About how many rows the file has: lines of text as long as its first ones, unpacked by gzip's usual factor."""
        start = first_bytes(self.path, 1 << 16)
        size = self.path.stat().st_size * (GZIP_FACTOR if is_packed(self.path) else 1)
        return size * max(1, start.count(b"\n")) // max(1, len(start))

    @abstractmethod
    def batches(self, places: Sequence[int]) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """All rows in order, of the columns at ``places`` (named "0", "1", ...), a bounded number at a time."""


@dataclass(frozen=True)
class TextOptions:
    """What the user says of delimited text; None is found out. header: whether line 1 names the columns."""

    delimiter: str | None = None
    header: bool | None = None
    quoting: str = "auto"


def open_source(
    path: Path, options: TextOptions, requests: Sequence[ColumnRequest | None] | None
) -> TableSource:
    """The file by its kind. requests: ``--columns``, which help to find the delimiter and the header of text."""
    kind = kind_of(path)
    if kind == "text":
        return TextSource(path, options, requests)
    if options.delimiter is not None:
        raise UserError(f"{path}: --delimiter is for delimited text, and this is {kind}")
    if kind == "json":
        return JsonSource(path)
    return ParquetSource(path) if kind == "parquet" else ArrowSource(path)


class TextSource(TableSource):
    """Delimited text, gzip and zstd included."""

    def __init__(
        self, path: Path, options: TextOptions, requests: Sequence[ColumnRequest | None] | None
    ) -> None:
        super().__init__(path)
        lines, self.first_line = text.first_lines(path)
        self.dialect = find_dialect(path, lines, options, requests)
        rows = [self.dialect.split(line) for line in lines]
        self.first_fields = rows[0]
        self.num_fields = len(rows[0])
        body = [row for row in rows[1:] if len(row) == self.num_fields]
        self.header = rows[0] if self._is_header(rows[0], body, options, requests) else None
        if self.header is None:
            body = [rows[0], *body]
        self.sample = pl.DataFrame(
            [
                pl.Series(str(place), [row[place] for row in body], pl.String)
                for place in range(self.num_fields)
            ]
        )

    def _is_header(
        self,
        fields: list[str],
        body: list[list[str]],
        options: TextOptions,
        requests: Sequence[ColumnRequest | None] | None,
    ) -> bool:
        """Whether line 1 names the columns: as the user says, or because it has names that are known or asked for."""
        if options.header is not None:
            return options.header
        if requests is None:
            return has_known_names(fields)
        if is_named(requests, fields):
            return True
        places = [
            place
            for place, each in enumerate(requests[: len(fields)])
            if each and (each.name in ("rating", "timestamp") or each.kind in ("numerical", "time"))
        ]
        named = all(fields[place] and not _has_digit(fields[place]) for place in places)
        numbered = any(_has_digit(row[place]) for place in places for row in body[:1])
        return bool(places) and named and numbered  # words above numbers

    def batches(self, places):
        skip = self.first_line if self.header is not None else self.first_line - 1
        for whole in text.read_blocks(self.path, self.dialect.quoting):
            block = whole.after_line(skip)
            if not block.data.strip(b" \t\n"):
                continue
            table = text.parse(self.path, block, self.dialect, self.num_fields, list(places))

            def place_of(row: int, block: text.Block = block) -> str:
                return f"line {text.line_of_row(block, row, self.dialect)}"

            yield Rows(str(self.path), place_of), pl.DataFrame(pl.from_arrow(table))


def find_dialect(
    path: Path, lines: list[str], options: TextOptions, requests: Sequence[ColumnRequest | None] | None
) -> text.Dialect:
    """The delimiter as given, or the only one that divides all first lines alike; UserError where several may be meant."""
    if options.delimiter is not None:
        return text.Dialect(
            None if options.delimiter == " " else options.delimiter, _quotes(options, options.delimiter)
        )
    fitting: list[tuple[text.Dialect, list[str]]] = []
    for delimiter in text.DELIMITERS:
        dialect = text.Dialect(delimiter, _quotes(options, delimiter))
        rows = [dialect.split(line) for line in lines]
        if len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            fitting.append((dialect, rows[0]))
    if not fitting:  # a faulty line: read by the delimiter of line 1, its fault is named later
        first = next((each for each in text.DELIMITERS[:-1] if each and each in lines[0]), None)
        return text.Dialect(first, _quotes(options, first))
    if (
        len(fitting) > 1
    ):  # one that finds the columns, or as many as are asked for, or a mark rather than blanks
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


def _quotes(options: TextOptions, delimiter: str | None) -> bool:
    """RFC 4180 quotes are of CSV: one mark that is no tab or blank between the fields."""
    if options.quoting != "auto":
        return options.quoting == "csv"
    return delimiter is not None and len(delimiter) == 1 and delimiter not in "\t "


class JsonSource(TableSource):
    """JSON lines, gzip and zstd included. A key that a line lacks is missing there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        lines, self.first_line = text.first_lines(path)
        block = text.Block("\n".join(lines).encode(), self.first_line)
        self.sample = _read_json(path, block, None)
        self.header = self.sample.columns
        self.num_fields = len(self.header)
        scalar = [name for name in self.header if not self.sample[name].dtype.is_nested()]
        self.sample = self.sample.with_columns(
            pl.lit(None).alias(name) for name in self.header if name not in scalar
        ).rename({name: str(place) for place, name in enumerate(self.header)})

    def batches(self, places):
        assert self.header is not None
        names = [self.header[place] for place in places]
        for block in text.read_blocks(self.path, quoting=False):
            if not block.data.strip():
                continue
            frame = _read_json(self.path, block, names)

            def place_of(row: int, block: text.Block = block) -> str:
                return f"line {text.line_of_row(block, row, text.Dialect(None, False))}"

            yield Rows(str(self.path), place_of), frame.rename(dict(zip(names, map(str, places))))


def _read_json(path: Path, block: text.Block, names: list[str] | None) -> pl.DataFrame:
    """The lines' values of ``names`` as text; all values with their own types where it is None."""
    schema = None if names is None else dict.fromkeys(names, pl.String())
    try:
        return pl.read_ndjson(io.BytesIO(block.data), schema=schema, infer_schema_length=SAMPLE_ROWS)
    except pl.exceptions.PolarsError as error:
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            try:
                if line.strip():
                    pl.read_ndjson(io.BytesIO(line), schema=schema)
            except pl.exceptions.PolarsError as fault:
                raise UserError(f"{path}, line {number}: not a JSON object: {_one_line(fault)}") from error
        raise UserError(f"{path}, near line {block.first_line}: {_one_line(error)}") from error


class ParquetSource(TableSource):
    """A Parquet file, read some rows of a row group at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open([]) as file:
            schema, metadata = file.schema_arrow, file.metadata
            self.num_rows = metadata.num_rows
            # Of row groups alone: pyarrow ends the process on faulty metadata of columns.
            groups = range(metadata.num_row_groups)
            unpacked = max(self.num_rows, sum(metadata.row_group(each).total_byte_size for each in groups))
            held = path.stat().st_size
        if unpacked > max(SMALL_BYTES, MOST_UNPACKED * held):
            raise UserError(
                f"{path}: {held} bytes that unpack to {unpacked} or more; is this a table of events?"
            )
        if self.num_rows == 0:
            raise UserError(f"{path}: the file is empty: it holds no event")
        self.header = schema.names
        self.num_fields = len(self.header)
        # text is read as dictionaries, so that a long value that every row repeats is held once
        self.text_columns = [
            field.name for field in schema if _is_text(field.type) and not pa.types.is_string_view(field.type)
        ]
        _, batch = next(self._read(self.header, SAMPLE_ROWS))
        self.sample = _sample(batch)

    def estimated_rows(self) -> int:
        return self.num_rows

    def _open(self, dictionaries: list[str]) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path, read_dictionary=dictionaries)
            file.schema_arrow.names  # noqa: B018  names that are no text raise here
            return file
        except UnicodeEncodeError:
            raise UserError(f"{self.path}: the name of a Parquet file must be UTF-8; rename it") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path}: not a readable Parquet file, or cut short: {_one_line(error)}"
            ) from error

    def batches(self, places):
        assert self.header is not None
        names = [self.header[place] for place in places]
        for first, batch in self._read(names, _BATCH_BYTES // (64 * max(1, len(places)))):
            yield _rows_and_frame(self.path, first, batch, names, places)

    def _read(self, names: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the number of rows before each."""
        done = 0
        try:
            with self._open([name for name in names if name in self.text_columns]) as file:
                for batch in file.iter_batches(batch_rows, columns=names):
                    yield done, _checked(self.path, done, batch)
                    done += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: damaged after row {done}: {_one_line(error)}") from error
        if done != self.num_rows:
            raise UserError(f"{self.path}: damaged: {done} rows where its footer says {self.num_rows}")


class ArrowSource(TableSource):
    """An Arrow IPC file or stream."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sample = pl.DataFrame()
        for batch in self._record_batches():
            _checked(path, 0, batch)
            self.header, self.sample = batch.schema.names, _sample(batch.slice(0, SAMPLE_ROWS))
            if batch.num_rows:
                break
        if not len(self.sample):
            raise UserError(f"{path}: the file is empty: it holds no event")
        self.num_fields = len(self.header or [])

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        try:
            with open_unpacked(self.path) as stream:
                if stream.read(6) == b"ARROW1":
                    with pa.memory_map(str(self.path)) as mapped:
                        reader = pyarrow.ipc.open_file(mapped)
                        for number in range(reader.num_record_batches):
                            yield reader.get_batch(number)
                    return
                stream.seek(0)
                yield from pyarrow.ipc.open_stream(stream)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: damaged or cut short: {_one_line(error)}") from error

    def batches(self, places):
        assert self.header is not None
        names = [self.header[place] for place in places]
        done = 0
        for batch in self._record_batches():
            yield _rows_and_frame(self.path, done, _checked(self.path, done, batch), names, places)
            done += batch.num_rows


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _checked(path: Path, first: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch; UserError where its text is not UTF-8 or its offsets and indices lead out of it, as a forged file's may."""
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(
                f"{path}, row {first + 1} or later: column {name!r} is not UTF-8 text, or damaged: {_one_line(error)}"
            ) from error
    return batch


def _sample(batch: pa.RecordBatch) -> pl.DataFrame:
    """All columns of a batch by place; those that hold no value of an event, nested or long ones, are empty."""
    columns = []
    for place, column in enumerate(batch.columns):
        kept = not pa.types.is_nested(column.type) and _first_long(_text_of(column)) is None
        columns.append(pl.Series(str(place), pl.from_arrow(_plain(column)) if kept else [None] * len(column)))
    return pl.DataFrame(columns)


def _rows_and_frame(
    path: Path, first: int, batch: pa.RecordBatch, names: list[str], places: Sequence[int]
) -> tuple[Rows, pl.DataFrame]:
    """Columns of a batch by place; UserError for text that is longer than an id, before it is copied into every row."""
    rows = Rows(str(path), lambda row: f"row {first + row + 1}")
    columns = []
    for name, place in zip(names, places):
        column = batch.column(name)
        text = _text_of(column)
        at = _first_long(text)
        if text is not None and at is not None:
            row = pc.index(column.indices, at).as_py() if pa.types.is_dictionary(column.type) else at
            size = pc.binary_length(text[at]).as_py()
            raise rows.fault(row, name, None, f"has {size} bytes; an id has at most {MAX_ID_BYTES}")
        plain = pa.nulls(len(column)) if pa.types.is_nested(column.type) else _plain(column)
        columns.append(pl.Series(str(place), pl.from_arrow(plain)))
    return rows, pl.DataFrame(columns)


def _text_of(column: pa.Array) -> pa.Array | None:
    """The texts of a column, of a dictionary each once; None where it holds none."""
    text = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string_view(text.type):
        text = text.cast(pa.large_string())
    return text if _is_text(text.type) else None


def _first_long(text: pa.Array | None) -> int | None:
    """Where the first text lies that is longer than an id may be."""
    if text is None:
        return None
    at = pc.index(pc.greater(pc.binary_length(text), MAX_ID_BYTES), True).as_py()
    return None if at < 0 else at


def _plain(column: pa.Array) -> pa.Array:
    """Without dictionaries and string views, which polars would read as types of their own."""
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _has_digit(field: str) -> bool:
    return any(character.isdigit() for character in field)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
