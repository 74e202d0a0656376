"""Typed values of raw columns, and the first value of each that is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from generative_recommenders.data.readers.times import (
    MAX_SECONDS,
    MISSING,
    NANOSECONDS,
    UNIT_NAMES,
    TimeFormat,
    to_nanoseconds,
)
from generative_recommenders.errors import UserError

MAX_ID_BYTES = 1024
_LONGEST_MISSING = max(map(len, MISSING))
_ABSENT = "is missing; remove the row, or leave the column out with --columns"
_MAX_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Rows:
    """Rows of one file that were read together. file: its path. place_of: row from 0 -> "line 7" or "row 7"."""

    file: str
    place_of: Callable[[int], str]

    def fault(self, row: int, name: str, value: object, reason: str) -> UserError:
        """The error of one value: file, line or row, value, reason, remedy."""
        shown = "" if value is None else f" {str(value)[:40]!r}"
        return UserError(f"{self.file}, {self.place_of(row)}: the {name}{shown} {reason}")

    def refuse(self, bad: pl.Series, values: pl.Series, name: str, reason: str) -> None:
        """UserError for the first row where ``bad`` is true."""
        if (at := first_true(bad.fill_null(True))) is not None:
            raise self.fault(at, name, values[at], reason)


def first_true(flags: pl.Series) -> int | None:
    """The first row whose flag is true."""
    row = flags.arg_max()
    return row if row is not None and flags[row] else None


def ids(values: pl.Series, name: str, rows: Rows) -> tuple[pl.Series, pl.Series]:
    """Ids as text, and which are missing (bool). UserError: ids that are neither text nor integers, or too long."""
    whole = values.dtype.is_integer() or (isinstance(values.dtype, pl.Decimal) and values.dtype.scale == 0)
    if whole or values.dtype in (pl.Categorical, pl.Enum, pl.Null):
        values = values.cast(pl.String)
    if values.dtype != pl.String:
        raise UserError(f"{rows.file}: the {name}s are of type {values.dtype}; ids must be text or integers")
    lengths = values.str.len_bytes()
    rows.refuse(
        (lengths > MAX_ID_BYTES).fill_null(False), values, name,
        f"is longer than {MAX_ID_BYTES} bytes; is this column the {name}?",
    )  # fmt: skip
    missing = values.is_null()
    plain = values.str.strip_chars() if values.str.contains(r"^\s|\s$").any() else values
    if (plain.str.len_bytes() <= _LONGEST_MISSING).any():  # comparing text costs more than its length
        missing |= plain.is_in(MISSING)
    return values, missing


def numbers(values: pl.Series, name: str, rows: Rows, optional: bool = False) -> pl.Series:
    """Finite float32 numbers; null for missing ones where they are ``optional``."""
    if values.dtype == pl.String:
        # Without a missing or faulty value, as almost always, the text need not be looked at again.
        found = values.cast(pl.Float64, strict=False)
        if not found.null_count() and (found.abs() <= _MAX_FLOAT32).all() and not found.is_nan().any():
            return found.cast(pl.Float32)
        text = values.str.strip_chars()
        missing = text.is_null() | text.is_in(MISSING)
        found = text.cast(pl.Float64, strict=False)
    elif values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null):
        found = values.cast(pl.Float64)
        missing = found.is_null() | found.is_nan()
    else:
        raise UserError(f"{rows.file}: the {name}s are of type {values.dtype}; they must be numbers")
    if optional:
        found = found.set(missing, None)
    else:
        rows.refuse(missing, values, name, _ABSENT)
    rows.refuse(found.is_null() & ~missing, values, name, "is not a number")
    rows.refuse((~found.is_finite()).fill_null(False), values, name, "is not a finite number")
    rows.refuse((found.abs() > _MAX_FLOAT32).fill_null(False), values, name, "is too large")
    return found.cast(pl.Float32)


def times(values: pl.Series, name: str, form: TimeFormat, rows: Rows, optional: bool = False) -> pl.Series:
    """int64 nanoseconds since 1970; null for missing ones where they are ``optional``."""
    found = to_nanoseconds(values, form)
    missing = values.is_null()
    if values.dtype == pl.String:
        missing |= values.str.strip_chars().is_in(MISSING).fill_null(True)
    elif values.dtype.is_float():
        missing |= values.is_nan().fill_null(True)
    if not optional:
        rows.refuse(missing, values, name, _ABSENT)
    row = first_true(found.is_null() & ~missing)
    if row is None:
        return found
    if values.dtype.is_temporal():  # which may be no time that Python can show
        raise rows.fault(row, name, None, "lies outside the years 1970 to 2200")
    number = values.slice(row, 1).cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)[0]
    if form.unit is None:
        reason = f"is not written like the times before it ({form}), or lies outside the years 1970 to 2200"
    elif number is None or not math.isfinite(number):
        reason = f"is not a number, as the times before it ({form})"
    elif number < 0:
        reason = "is before 1970"
    elif number * NANOSECONDS[form.unit] > MAX_SECONDS * 10**9:
        reason = f"lies after the year 2200 in {form}; give its unit with --time_unit ({', '.join(UNIT_NAMES)})"
    else:
        reason = "is not a time"
    raise rows.fault(row, name, values[row], reason)


def categories(values: pl.Series, name: str, rows: Rows) -> pl.Series:
    """Categories as text, null for missing ones."""
    number = values.dtype.is_integer() or values.dtype.is_float()
    if number or values.dtype in (pl.Categorical, pl.Enum, pl.Null, pl.Boolean):
        values = values.cast(pl.String)
    if values.dtype != pl.String:
        raise UserError(f"{rows.file}: column {name!r} is of type {values.dtype}; categories must be text or numbers")
    text = values.str.strip_chars()
    long = (text.str.len_bytes() > MAX_ID_BYTES).fill_null(False)
    rows.refuse(long, values, name, f"is longer than {MAX_ID_BYTES} bytes; is it a category?")
    return text.set(text.is_in(MISSING).fill_null(True), None)
