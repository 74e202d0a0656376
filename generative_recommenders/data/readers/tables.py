"""Parquet and Arrow IPC files as tables, within a budget of bytes whatever their headers claim."""

from __future__ import annotations

import mmap
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from generative_recommenders.data.readers.files import EmptyFileError, open_raw, unpacked_limit
from generative_recommenders.data.readers.layout import Column
from generative_recommenders.data.readers.values import MAX_ID_BYTES, Rows
from generative_recommenders.errors import UserError, first_line

SAMPLE_ROWS = 100
_BATCH_BYTES = 64 << 20
"""Values of a batch are taken on within about so many bytes."""
SMALL_BYTES, _PART_BYTES = 64 << 20, 2 << 30
"""Limit of the unpacked size of a table, and of a row group or record batch, of which much is unpacked at once."""
_DIFFERENCE_ROWS = 128


class TableSource(ABC):
    """One raw file. header: names of its columns, or None where line 1 is data. sample: its first rows, all columns,
    called "0", "1", ... by their places."""

    header: list[str] | None
    sample: pl.DataFrame
    first_fields: Sequence[str] = ()
    """Of line 1 of delimited text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def batches(self, columns: Sequence[Column]) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """All rows in order, of these columns by their names, a bounded number at a time."""


class ParquetSource(TableSource):
    """A Parquet file, read some rows of a row group at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open([]) as file:
            schema = file.schema_arrow
            self.num_rows = file.metadata.num_rows
            check_parquet(path, file.metadata)
        if self.num_rows == 0:
            raise EmptyFileError(path)
        self.header = schema.names
        # text is read as dictionaries, so that a long value that every row repeats is held once
        self.text_columns = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
        # text as differences to the one before: a row may stand for a long text of few bytes, so that few are read at a
        # time
        self.differences = False
        _, batch = next(self._read(self.header, SAMPLE_ROWS))
        self.sample = _sample(batch)

    def _open(self, dictionaries: list[str]) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path, read_dictionary=dictionaries)
            file.schema_arrow.names  # noqa: B018  names that are no text raise here
            return file
        except UnicodeEncodeError:
            raise UserError(f"{self.path}: the name of a Parquet file must be UTF-8; rename it") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: not a readable Parquet file, or cut short: {first_line(error)}") from error

    def batches(self, columns):
        for first, batch in self._read([column.header for column in columns], _batch_rows(columns)):
            yield _rows_and_frame(self.path, first, batch, columns)

    def _read(self, names: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the number of rows before each."""
        done = 0
        while done < self.num_rows:
            dictionaries = [] if self.differences else [name for name in names if name in self.text_columns]
            try:
                with self._open(dictionaries) as file:
                    first = 0
                    batches = file.iter_batches(_DIFFERENCE_ROWS if self.differences else batch_rows, columns=names)
                    for batch in _joined(batches, batch_rows) if self.differences else batches:
                        new = batch.slice(min(batch.num_rows, max(0, done - first)))
                        first += batch.num_rows
                        if new.num_rows:
                            yield done, _checked(self.path, done, new)
                            done += new.num_rows
            except (pa.ArrowException, OSError) as error:
                # pyarrow gives such text without dictionaries alone
                if self.differences or "DictAccumulator" not in str(error):
                    raise UserError(f"{self.path}: damaged after row {done}: {first_line(error)}") from error
                self.differences = True
                continue
            if done != self.num_rows:
                raise UserError(f"{self.path}: damaged: {done} rows where its footer says {self.num_rows}")


def _joined(batches: Iterator[pa.RecordBatch], most_rows: int) -> Iterator[pa.RecordBatch]:
    """Short batches as longer ones, within the budget of bytes."""
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        waiting.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= most_rows or size >= _BATCH_BYTES:
            yield pa.concat_batches(waiting)
            waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_batches(waiting)


class ArrowSource(TableSource):
    """An Arrow IPC file or stream, mapped, so that values that are not packed are not copied."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sample = pl.DataFrame()
        for batch in self._record_batches():
            self.header, self.sample = batch.schema.names, _sample(batch.slice(0, SAMPLE_ROWS))
            if batch.num_rows:
                break
        if not len(self.sample):
            raise EmptyFileError(path)

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        done = 0
        try:
            with open_raw(self.path) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            check_claims(self.path, mapped)
            if mapped[:6] == b"ARROW1":
                reader = pyarrow.ipc.open_file(pa.BufferReader(mapped))
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(pa.BufferReader(mapped)))
            for batch in batches:
                yield _checked(self.path, done, batch)
                done += batch.num_rows
        except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, struct.error) as error:
            raise UserError(f"{self.path}: damaged or cut short: {first_line(error)}") from error

    def batches(self, columns):
        done = 0
        for batch in self._record_batches():
            for first in range(0, batch.num_rows, _batch_rows(columns)):
                part = batch.slice(first, _batch_rows(columns))
                yield _rows_and_frame(self.path, done + first, part, columns)
            done += batch.num_rows


def check_parquet(path: Path, metadata: pq.FileMetaData) -> None:
    """UserError for a file whose row groups unpack to too much. Of groups alone: pyarrow ends the process on faulty
    metadata of columns."""
    groups = [metadata.row_group(each).total_byte_size for each in range(metadata.num_row_groups)]
    check_unpacked(path, max(groups, default=0), _PART_BYTES)
    check_unpacked(path, max(metadata.num_rows, sum(groups)))


def check_unpacked(path: Path, unpacked: int, most: float = float("inf")) -> None:
    """UserError for a file that claims far more bytes than files of events do, or more than ``most``."""
    if unpacked > min(unpacked_limit(path, SMALL_BYTES), most):
        held = path.stat().st_size
        raise UserError(f"{path}: {held} bytes that unpack to {unpacked} or more; is this a table of events?")


def check_claims(path: Path, data: mmap.mmap) -> None:
    """UserError where the messages of an Arrow IPC file or stream claim too many rows or unpacked bytes.

    pyarrow allocates what the head of a packed buffer claims, and tells nothing of it before. The layout is that of
    Message.fbs and File.fbs of Arrow's columnar format 1.0, whose tables are FlatBuffers. EOFError, ValueError,
    struct.error: damaged.
    """
    source = pa.BufferReader(data)
    if data[:6] == b"ARROW1":
        # The footer says where each message lies: field 2 has dictionaries, 3 record batches.
        (size,) = struct.unpack_from("<i", data, len(data) - 10)
        footer = _FlatTable(data, len(data) - 10 - size)
        blocks = [*footer.structs(2, "<qi4xq"), *footer.structs(3, "<qi4xq")]

        def message_at(place: int) -> pyarrow.ipc.Message:
            source.seek(place)
            return pyarrow.ipc.read_message(source)

        # One at a time: a message that claims too much ends the reading before the next one.
        messages = (message_at(start) for start, _, _ in blocks)
    else:
        messages = pyarrow.ipc.MessageReader.open_stream(source)
    total = 0
    for message in messages:
        if message.type not in ("dictionary", "record batch"):
            continue
        batch = _FlatTable(message.metadata, 0).child(2)
        batch = batch.child(1) if message.type == "dictionary" else batch
        packed = batch.structs(2, "<qq") if batch.place(3) else ()  # field 3: how buffers are packed
        heads = [struct.unpack_from("<q", message.body, offset)[0] for offset, length in packed if length]
        unpacked = sum(max(0, head) for head in heads)  # -1: as it is
        check_unpacked(path, unpacked, _PART_BYTES)
        rows_at = batch.place(0)
        rows = struct.unpack_from("<q", message.metadata, rows_at)[0] if rows_at else 0
        total += max(rows, unpacked)
        check_unpacked(path, total)


class _FlatTable:
    """A table of a FlatBuffer, which ``data`` points to at the place ``pointer``; its fields are numbered."""

    def __init__(self, data: mmap.mmap | pa.Buffer, pointer: int) -> None:
        self.data = data
        self.start = pointer + struct.unpack_from("<I", data, pointer)[0]

    def place(self, field: int) -> int:
        """Where a field lies; 0 where it is absent."""
        # A table begins with the distance back to its list of offsets, which begins with its own size; a field that was
        # not written has the offset 0, or lies past the end of a list of an older program.
        places = self.start - struct.unpack_from("<i", self.data, self.start)[0]
        (size,) = struct.unpack_from("<H", self.data, places)
        offset = struct.unpack_from("<H", self.data, places + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return self.start + offset if offset else 0

    def child(self, field: int) -> _FlatTable:
        return _FlatTable(self.data, self.place(field))

    def structs(self, field: int, form: str) -> list[tuple[int, ...]]:
        if not (place := self.place(field)):
            return []
        place += struct.unpack_from("<I", self.data, place)[0]
        (count,) = struct.unpack_from("<I", self.data, place)
        return list(struct.iter_unpack(form, self.data[place + 4 : place + 4 + count * struct.calcsize(form)]))


def _batch_rows(columns: Sequence[Column]) -> int:
    """Rows of so many columns that lie within the budget."""
    return _BATCH_BYTES // (64 * len(columns))


def _checked(path: Path, first: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch; UserError where its text is not UTF-8 or its offsets and indices lead out of it, as a forged file's
    may."""
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(
                f"{path}, row {first + 1} or later: column {name!r} is not UTF-8 text, or damaged: {first_line(error)}"
            ) from error
    return batch


def _sample(batch: pa.RecordBatch) -> pl.DataFrame:
    """All columns of a batch by place; those that hold no value of an event, as lists or long texts, are empty."""
    columns = []
    for place, column in enumerate(batch.columns):
        try:
            columns.append(_series(column).alias(str(place)))
        except _NO_SERIES:
            columns.append(pl.Series(str(place), [None] * len(column)))
    return pl.DataFrame(columns)


def _rows_and_frame(
    path: Path, first: int, batch: pa.RecordBatch, columns: Sequence[Column]
) -> tuple[Rows, pl.DataFrame]:
    rows = Rows(str(path), lambda row: f"row {first + row + 1}")
    found = []
    for column in columns:
        values = batch.column(column.header)
        try:
            found.append(_series(values).alias(column.name))
        except _LongTextError as long:
            what = f"has {long.size} bytes; an id has at most {MAX_ID_BYTES}"
            raise rows.fault(long.row, str(column.header), None, what) from None
        except _NO_SERIES:
            raise UserError(
                f"{path}: column {column.header!r} is of type {values.type}, which holds no value of an event"
            ) from None
    return rows, pl.DataFrame(found)


class _LongTextError(Exception):
    """A text that is longer than an id may be."""

    def __init__(self, row: int, size: int) -> None:
        self.row, self.size = row, size


_NO_SERIES = (
    _LongTextError, pl.exceptions.PolarsError, pa.ArrowException, NotImplementedError, TypeError, ValueError,
)  # fmt: skip


def _series(column: pa.Array) -> pl.Series:
    """A column as polars' plain types, without dictionaries, extensions, views and time zones; `_NO_SERIES` for a type
    that holds no values of events."""
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return _series(column.storage)
    if pa.types.is_dictionary(kind):
        try:
            values = _series(column.dictionary)
        except _LongTextError as long:
            raise _LongTextError(pc.index(column.indices, long.row).as_py(), long.size) from None
        return values.gather(pl.Series(pl.from_arrow(column.indices)).cast(pl.Int64))
    if pa.types.is_nested(kind) or pa.types.is_run_end_encoded(kind):
        raise TypeError(kind)
    if pa.types.is_string_view(kind):
        column = column.cast(pa.large_string())  # few of pyarrow's functions know views
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Before a text of megabytes is copied into every row that a dictionary or run of rows gives it to.
        sizes = pc.binary_length(column)
        row = pc.index(pc.greater(sizes, MAX_ID_BYTES), True).as_py()
        if row >= 0:
            raise _LongTextError(row, sizes[row].as_py())
    if pa.types.is_timestamp(kind):
        column = column.view(pa.timestamp(kind.unit))  # in UTC whatever its zone, which the machine may not know
    return pl.Series(pl.from_arrow(column))
