"""Ratings in Parquet to typed columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from generative_recommenders.data.column_roles import Roles, check_roles, roles_by_name
from generative_recommenders.data.ratings_table import MAX_TIMESTAMP, ROLES
from generative_recommenders.features import UserError

BATCH_ROWS = 1 << 20


def is_parquet(path: Path) -> bool:
    """True if the file begins with Parquet's magic bytes."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def num_rows(path: Path) -> int:
    """Rows, from the footer."""
    with _open(path) as file:
        return file.metadata.num_rows


def roles(path: Path, columns: tuple[str, ...] | None) -> Roles:
    """The role of each column of the schema, by the names given or by known names."""
    with _open(path) as file:
        return roles_by_name(path, file.schema_arrow.names, columns)


def read(path: Path, columns: Roles | None) -> Iterator[pa.Table]:
    """Yield the rows in order (see ``ratings_table.read_batches``); UserError with the row at fault."""
    with _open(path) as file:
        names = file.schema_arrow.names
        file_roles = roles_by_name(path, names) if columns is None else check_roles(path, columns)
        if len(file_roles) != len(names):
            raise UserError(
                f"{path}: {len(names)} columns where {len(file_roles)} are expected: {', '.join(names)[:200]}"
            )
        name_of = {role: name for name, role in zip(names, file_roles) if role is not None}
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty: it holds no rating")
        row = 1
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(name_of.values())):
                arrays = {
                    role: _typed(path, role, batch[name_of[role]], row) for role in ROLES if role in name_of
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file, or cut short: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _typed(path: Path, role: str, column: pa.Array, first_row: int) -> pa.Array:
    _refuse(path, first_row, column.is_null(), f"the {role} is missing")
    try:
        if role == "rating":
            return _ratings(path, column.cast(pa.float32(), safe=False), first_row)
        return (
            _timestamps(path, column, first_row)
            if role == "timestamp"
            else _ids(path, role, column, first_row)
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: column of the {role} has type {column.type}: {_one_line(error)}") from error


def _ids(path: Path, role: str, column: pa.Array, first_row: int) -> pa.Array:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: ids must be strings or integers, and the {role} is {column.type}")
    ids = column.cast(pa.large_string())
    ids.validate(full=True)
    _refuse(path, first_row, pc.equal(pc.binary_length(ids), 0), f"the {role} is empty")
    return ids


def _ratings(path: Path, ratings: pa.Array, first_row: int) -> pa.Array:
    _refuse(path, first_row, pc.invert(pc.is_finite(ratings)), "the rating is not a finite number")
    return ratings


def _timestamps(path: Path, column: pa.Array, first_row: int) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s", tz=column.type.tz), safe=False)
    times = column.cast(pa.int64())
    bad = pc.or_(pc.less(times, 0), pc.greater(times, MAX_TIMESTAMP))
    _refuse(path, first_row, bad, "the timestamp is negative or after the year 2200 (times are in seconds)")
    return times


def _refuse(path: Path, first_row: int, bad: pa.Array, what: str) -> None:
    at = pc.index(bad, True).as_py()
    if at >= 0:
        raise UserError(f"{path}, row {first_row + at}: {what}")
