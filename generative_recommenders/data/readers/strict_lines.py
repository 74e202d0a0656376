"""Lines of delimited text, one at a time: what a rating is, and which line is not one."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from generative_recommenders.data.readers.column_roles import Roles, is_known
from generative_recommenders.data.readers.ratings_table import MAX_TIMESTAMP, ROLES
from generative_recommenders.errors import UserError

_NUMBER = re.compile(r" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})? *")
_NOT_FINITE = re.compile(r" *[+-]?(?:nan|inf|infinity|na|null|none) *", re.IGNORECASE)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def split_line(line: str, delimiter: str | None) -> list[str]:
    """The fields of one line; quotes count only with a delimiter of one character."""
    if delimiter is None:
        return re.split(r"[ \t]+", line.strip(" \t"))
    if len(delimiter) > 1:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return line.split(delimiter)


def is_well_quoted(line: str, delimiter: str | None) -> bool:
    """Whether the quotes of the line, where they count, are closed and end with their field."""
    if delimiter is None or len(delimiter) > 1:
        return True
    try:
        list(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def resembles_number(field: str) -> bool:
    """Whether the field is a number, or a faulty one: missing, not finite, with a decimal comma."""
    text = field.replace(",", ".", 1)
    return not text.strip() or bool(_NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text))


def looks_like_header(fields: Sequence[str], roles: Sequence[str | None]) -> bool:
    """True if no field of a numeric role is a number, or (no such role) a field has a known name."""
    numeric = [field for field, role in zip(fields, roles) if role in ("rating", "timestamp")]
    if numeric:
        return not any(
            _NUMBER.fullmatch(field) or _NOT_FINITE.fullmatch(field) or not field for field in numeric
        )
    return is_known(fields)


def parse_lines(path: Path, data: bytes, first_line: int, delimiter: str | None, roles: Roles) -> pa.Table:
    """Rows of a block of lines, or UserError with the number of the first bad line."""
    columns: dict[str, list] = {role: [] for role in ROLES if role in roles}
    wanted = [(role, i, columns[role]) for i, role in enumerate(roles) if role is not None]
    for number, fields in _records(path, data, first_line, delimiter):
        try:
            if len(fields) != len(roles):
                raise ValueError(f"{len(fields)} fields where {len(roles)} are expected")
            for role, i, column in wanted:
                column.append(VALUE_OF[role](fields[i]))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    types = {"rating": pa.float32(), "timestamp": pa.int64()}
    return pa.table(
        {role: pa.array(values, types.get(role, pa.large_string())) for role, values in columns.items()}
    )


def _records(
    path: Path, data: bytes, first_line: int, delimiter: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line that is not blank."""
    lines = _decode(path, data, first_line)
    if delimiter is None or len(delimiter) > 1:
        for number, line in enumerate(lines, first_line):
            if line.strip(" \t"):
                yield number, split_line(line, delimiter)
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = first_line - 1
    try:
        for fields in reader:
            number += 1
            if reader.line_num != number - first_line + 1:
                raise UserError(f"{path}, line {number}: a quote is opened and not closed on the line")
            if fields and not (len(fields) == 1 and not fields[0].strip(" \t")):
                yield number, fields
    except csv.Error as error:
        reason = "a quote is opened and not closed" if "end of data" in str(error) else str(error)
        raise UserError(f"{path}, line {number + 1}: {reason}") from error


def _decode(path: Path, data: bytes, first_line: int) -> list[str]:
    for byte, what in (
        (b"\0", "a NUL byte; is this a text file?"),
        (b"\r", "a carriage return inside the line"),
    ):
        if byte in data:
            number = first_line + data.count(b"\n", 0, data.index(byte))
            raise UserError(f"{path}, line {number}: {what}")
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8") from error


def _identifier(what: str, text: str) -> str:
    if not text:
        raise ValueError(f"the {what} is empty")
    return text


def _number(what: str, text: str) -> float:
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"the {what} is {text.strip()!r}, not a finite number")
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"the {what} {text[:40]!r} is not a number")
    return float(text)


def _rating(text: str) -> float:
    value = _number("rating", text)
    if not math.isfinite(value) or abs(value) > _MAX_FLOAT32:
        raise ValueError(f"the rating {text[:40]!r} is too large")
    return value


def _timestamp(text: str) -> int:
    value = _number("timestamp", text)
    if value < 0:
        raise ValueError(f"the timestamp {text[:40]!r} is negative")
    if value > MAX_TIMESTAMP:
        raise ValueError(
            f"the timestamp {text[:40]!r} lies after the year 2200; times are in seconds since 1970"
        )
    if value != int(value):
        raise ValueError(f"the timestamp {text[:40]!r} is not a whole number of seconds")
    return int(value)


VALUE_OF: dict[str, Callable[[str], Any]] = {
    "user": lambda text: _identifier("user", text),
    "item": lambda text: _identifier("item", text),
    "rating": _rating,
    "timestamp": _timestamp,
}
