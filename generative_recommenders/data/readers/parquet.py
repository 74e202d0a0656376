"""Ratings in Parquet to typed columns."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.readers.column_roles import (
    Roles,
    check_places,
    check_roles,
    roles_by_name,
    roles_like_first,
    say_left_out,
)
from generative_recommenders.data.readers.ratings_table import MAX_TIMESTAMP, ROLES, ReaderFormat
from generative_recommenders.errors import UserError

BATCH_ROWS = 1 << 20
_HEAD_BYTES = 1 << 16


def is_parquet(path: Path) -> bool:
    """True if the file begins with Parquet's magic bytes; UserError if they are packed by gzip."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start.startswith(b"\x1f\x8b") and _unpacked_start(start) == b"PAR1":
        raise UserError(f"{path}: gzipped Parquet: unpack it first")
    return start.startswith(b"PAR1")


def _unpacked_start(start: bytes) -> bytes:
    """The first bytes that a gzip file unpacks to; none if it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(start, 4)
    except zlib.error:
        return b""


def num_rows(path: Path) -> int:
    """Rows, from the footer."""
    with _open(path) as file:
        return file.metadata.num_rows


def sniff(path: Path, columns: tuple[str, ...] | None) -> ReaderFormat:
    """The role of each column of the schema (see ``ratings_table.sniff_format``)."""
    with _open(path) as file:
        names = file.schema_arrow.names
    if columns is None or set(columns) - set(ROLES) or set(columns) & set(names):
        roles = roles_by_name(path, names, columns)
        say_left_out(path, names, roles)
    else:
        roles = _roles_by_place(path, names, columns)
    return ReaderFormat(None, True, roles, tuple(names))


def roles_of(path: Path, layout: ReaderFormat) -> Roles:
    """The role of each column of the schema, as ``layout`` has it."""
    with _open(path) as file:
        return _roles(path, file.schema_arrow.names, layout)


def _roles(path: Path, names: list[str], layout: ReaderFormat) -> Roles:
    if layout.columns is None:
        return roles_by_name(path, names)
    if layout.names is not None:
        return roles_like_first(str(path), names, layout)
    return _roles_by_place(path, names, layout.columns)


def _roles_by_place(path: Path, names: list[str], columns: Roles) -> Roles:
    roles = check_roles(path, columns)
    if len(roles) != len(names):
        raise UserError(
            f"{path}: {len(names)} columns where {len(roles)} are expected: {', '.join(names)[:200]}"
        )
    check_places(str(path), names, roles)
    return roles


def read(path: Path, layout: ReaderFormat) -> Iterator[pa.Table]:
    """Yield the rows in order (see ``ratings_table.read_batches``); UserError with the row at fault."""
    with _open(path) as file:
        names = file.schema_arrow.names
        name_of = {role: name for name, role in zip(names, _roles(path, names, layout)) if role is not None}
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty: it holds no rating")
        row = 1
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(name_of.values())):
                arrays = {
                    role: _Column(path, role, name_of[role], row).typed(batch[name_of[role]])
                    for role in ROLES
                    if role in name_of
                }
                row += batch.num_rows
                yield pa.table(arrays)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged after row {row - 1}: {_one_line(error)}") from error
        if row - 1 != file.metadata.num_rows:
            raise UserError(f"{path}: damaged: {row - 1} rows where its footer says {file.metadata.num_rows}")


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        file.schema_arrow.names  # noqa: B018  names that are no text raise here
        return file
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name of a Parquet file must be UTF-8; rename it") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file, or cut short: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class _Column:
    """A batch of one column, for its faults: ``first_row`` is counted from 1."""

    path: Path
    role: str
    name: str
    first_row: int

    def typed(self, values: pa.Array) -> pa.Array:
        """The values as ``ratings_table.read_batches`` has them; UserError with the row that is none."""
        self.refuse(values.is_null(), "is missing")
        return {"rating": self.ratings, "timestamp": self.timestamps}.get(self.role, self.ids)(values)

    def ids(self, values: pa.Array) -> pa.Array:
        kind = _value_type(values)
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            raise self.wrong_type(values, "ids must be strings or integers")
        ids = values.cast(pa.large_string())
        self.convert(ids, lambda part: part.validate(full=True), "is not UTF-8 text", show=False)
        self.refuse(pc.equal(pc.binary_length(ids), 0), "is empty")
        return ids

    def ratings(self, values: pa.Array) -> pa.Array:
        kind = _value_type(values)
        if not (_is_number(kind) or _is_text(kind) or pa.types.is_boolean(kind)):
            raise self.wrong_type(values, "ratings must be numbers")
        values = _plain_text(values)
        ratings = self.convert(values, lambda part: part.cast(pa.float32(), safe=False), "is not a number")
        self.refuse(pc.invert(pc.is_finite(ratings)), "is not a finite number")
        return ratings

    def timestamps(self, values: pa.Array) -> pa.Array:
        kind = _value_type(values)
        if pa.types.is_timestamp(kind):
            values = values.cast(pa.timestamp("s", tz=kind.tz), safe=False)
        elif pa.types.is_date(kind):
            values = values.cast(pa.timestamp("s"))
        elif not (_is_number(kind) or _is_text(kind)):
            raise self.wrong_type(values, "times must be seconds since 1970, dates or of a timestamp type")
        times = self.convert(
            _plain_text(values), lambda part: part.cast(pa.int64()), "is not a whole number of seconds"
        )
        bad = pc.or_(pc.less(times, 0), pc.greater(times, MAX_TIMESTAMP))
        self.refuse(bad, "is negative or after the year 2200 (times are in seconds)")
        return times

    def convert(
        self, values: pa.Array, conversion: Callable[[pa.Array], Any], what: str, show: bool = True
    ) -> Any:
        """What ``conversion`` makes of the values; UserError with the first row that it refuses."""
        try:
            return conversion(values)
        except pa.ArrowInvalid as error:
            at = _first_refused(values, conversion)
            shown = f" {str(values[at].as_py())[:40]!r}" if show else ""
            raise self.fault(at, shown, what) from error

    def refuse(self, bad: pa.Array, what: str) -> None:
        at = pc.index(bad, True).as_py()
        if at >= 0:
            raise self.fault(at, "", what)

    def fault(self, at: int, shown: str, what: str) -> UserError:
        column = "" if self.name == self.role else f" (column {self.name!r})"
        return UserError(f"{self.path}, row {self.first_row + at}: the {self.role}{shown}{column} {what}")

    def wrong_type(self, values: pa.Array, what: str) -> UserError:
        return UserError(f"{self.path}: column {self.name!r} has type {values.type}; {what}")


def _first_refused(values: pa.Array, conversion: Callable[[pa.Array], Any]) -> int:
    """The place of the first value that the conversion does not take; there is one."""
    first, length = 0, len(values)
    while length > 1:
        half = length // 2
        try:
            conversion(values.slice(first, half))
            first, length = first + half, length - half
        except pa.ArrowInvalid:
            length = half
    return first


def _value_type(values: pa.Array) -> pa.DataType:
    return values.type.value_type if pa.types.is_dictionary(values.type) else values.type


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain_text(values: pa.Array) -> pa.Array:
    """Text of a type that becomes numbers; other values as they are."""
    return values.cast(pa.large_string()) if pa.types.is_string_view(values.type) else values
