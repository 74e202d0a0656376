"""Times of events: recognition of their unit or format, and exact conversion to nanoseconds since 1970.

A file has one format for all of its times. It is recognised from the first rows, unless the user names a unit, and
every later value that does not fit it is a fault of the file. Order is kept to the precision given; models see whole
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import polars as pl

NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""Length of each unit of time in nanoseconds."""
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
MAX_SECONDS = 7_258_118_400
"""2200-01-01 in seconds since 1970: a later time is a fault, most often a unit that was recognised wrongly."""
MISSING = ("", "NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")
"""Text that stands for a missing value in files that people export."""
_SMALLEST = {"ns": 10**17, "us": 10**14, "ms": 10**11}
"""Numbers from here on have this unit: as a coarser one they would lie after the year 4000."""
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\s*$"
_ZONE = r"([+-]\d{2}:?\d{2}|[+-]\d{2})$"
_NANOSECOND_YEARS = (1700, 2250)
"""Within what 64 bits of nanoseconds hold: polars takes a later or earlier time for another one in between."""
# As polars writes formats: %.f is a fraction with its point, or nothing. Of several that fit as many times the first is
# taken.
_ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%Y/%m/%d %H:%M:%S%.f", "%Y/%m/%d")
_COMPACT_DATE = "%Y%m%d"  # 20230531, which as a number of seconds would be a day of 1970
_COMPACT_NUMBERS = 19_700_101, 22_000_101
_OTHER_FORMATS = ("%a %b %d %H:%M:%S %z %Y",)  # Goodreads: Tue Sep 26 09:43:46 -0700 2017


@dataclass(frozen=True)
class TimeFormat:
    """Format of a file's times: numbers of a unit ("s", "ms", "us", "ns"), text of a format (`strptime`), or, with
    neither, values whose type is that of dates or datetimes."""

    unit: str | None = None
    text: str | None = None

    def __str__(self) -> str:
        if self.unit is not None:
            return UNIT_NAMES[self.unit]
        if self.text is None:
            return "dates or datetimes"
        return "ISO 8601" if self.text in _ISO_FORMATS else f"dates like {self.text!r}"


def recognise(values: pl.Series, unit: str | None = None) -> TimeFormat | None:
    """The format of a file's first times; None where they have none that is known, or are all missing.

    values: text, numbers, dates or datetimes; empty and null ones are passed over. unit: the unit of numbers, if the
    user names it.
    """
    values = values.drop_nulls()
    if values.dtype in (pl.Date, pl.Datetime):
        return TimeFormat()
    if values.dtype == pl.String:
        values = values.str.strip_chars()
        values = values.filter(~values.is_in(MISSING))
        may_be_compact = True
    elif values.dtype.is_numeric():
        values = values.drop_nans() if values.dtype.is_float() else values
        # Most numbers are told from dates by their size: parsing takes twenty times as long, in every answer with times
        may_be_compact = 2 * int(values.is_between(*_COMPACT_NUMBERS).sum()) > len(values)
    else:
        return None
    if unit is None and len(values) and may_be_compact:
        compact = TimeFormat(text=_COMPACT_DATE)
        if 2 * int(to_nanoseconds(values, compact).is_not_null().sum()) > len(values):
            return compact
    if values.dtype == pl.String:
        number = values.str.contains(_NUMBER)
        # The most of them decide: a faulty value is named later, with its line.
        if 2 * int(number.sum()) < len(values) or not len(values):
            forms = (*_ISO_FORMATS, *_OTHER_FORMATS)
            fits = {each: _parse_text(values, each).is_not_null().sum() for each in forms}
            best = max(fits, key=lambda each: fits[each])
            return TimeFormat(text=best) if 2 * fits[best] >= max(len(values), 1) else None
        values = values.filter(number).cast(pl.Float64, strict=False)
    if unit is not None:
        return TimeFormat(unit=unit)
    typical = cast(float, values.median()) if len(values) else 0.0  # one wrong value does not decide
    return TimeFormat(unit=next((each for each, least in _SMALLEST.items() if typical >= least), "s"))


def to_nanoseconds(values: pl.Series, form: TimeFormat) -> pl.Series:
    """``[n]`` int64 nanoseconds since 1970, null where a value is not a time of this format from 1970 to 2200."""
    if values.dtype == pl.Date:
        times = _scale(values.to_physical(), 86_400 * NANOSECONDS["s"])
    elif isinstance(values.dtype, pl.Datetime):
        times = _scale(values.to_physical(), NANOSECONDS[values.dtype.time_unit])
    elif form.text is not None:
        times = _parse_text(values.cast(pl.String), form.text)
    elif form.unit is not None:
        times = _scale(values, NANOSECONDS[form.unit])
    else:
        times = pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
    return times.set(times.is_between(0, MAX_SECONDS * 10**9).not_().fill_null(False), None)


def _scale(values: pl.Series, factor: int) -> pl.Series:
    """Numbers times ``factor`` as int64: whole ones exactly, others to a float64's precision; null for the rest."""
    limit = MAX_SECONDS * 10**9 // factor + 1  # beyond it the product may not fit into 64 bits
    if values.dtype == pl.String:
        plain = values.cast(pl.Int64, strict=False)
        if not plain.null_count():
            return plain.set((plain > limit) | (plain < -1), None) * factor
        values = values.str.strip_chars()
        values = values.set(values.str.contains(_NUMBER).not_(), None)
    if values.dtype.is_decimal():  # as databases export times with a fraction
        values = values.set((values > limit) | (values < -1), None)
        return (values.cast(pl.Decimal(38, 9)) * factor).cast(pl.Int64, strict=False)
    whole = values.cast(pl.Int64, strict=False) if not values.dtype.is_float() else None
    if whole is not None and whole.null_count() == values.null_count():
        return whole.set((whole > limit) | (whole < -1), None) * factor
    real = values.cast(pl.Float64, strict=False)
    real = real.set((real > limit) | (real < -1) | real.is_nan(), None)
    rounded = (real * factor).round().cast(pl.Int64, strict=False)
    if whole is None:
        return rounded
    exact = whole.set((whole > limit) | (whole < -1), None) * factor
    return exact.zip_with(whole.is_not_null(), rounded)


def _parse_text(values: pl.Series, form: str) -> pl.Series:
    """Text of a `strptime` format as int64 nanoseconds; an ISO time without a zone is in UTC."""
    if form in _OTHER_FORMATS:
        values = _without_far_years(values, values.str.tail(4))
        return values.str.to_datetime(form, time_unit="ns", strict=False).cast(pl.Int64)
    text = values.str.strip_chars().str.replace(r"\s*(Z|UTC)$", "").str.replace("T", " ", literal=True)
    text = _without_far_years(text, text.str.head(4))
    if form == _COMPACT_DATE:
        text = text.str.strip_suffix(".0")  # floats, which pandas makes of integers where one is missing
        # Of fewer digits polars reads dates, too.
        text = text.set((text.str.len_bytes() != 8).fill_null(False), None)
    if "%H" not in form:
        return text.str.to_date(form, strict=False).cast(pl.Datetime("ns")).cast(pl.Int64)
    # Zones are taken apart here: polars would want all times of a column to have one, or none. The date's dashes are no
    # zone.
    zone = text.str.slice(10).str.extract_groups(_ZONE).struct[0]
    has_zone = zone.is_not_null()
    if has_zone.any():
        text = text.str.replace(r"\s*" + _ZONE, "").zip_with(has_zone, text)
    parsed = text.str.to_datetime(form, time_unit="ns", strict=False, exact=True).cast(pl.Int64)
    if not has_zone.any():
        return parsed
    digits = zone.str.replace(":", "", literal=True)
    hours = digits.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0)
    minutes = digits.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
    sign = 1 - 2 * digits.str.starts_with("-").fill_null(False).cast(pl.Int64)
    return parsed - sign * (hours * 60 + minutes) * 60 * 10**9


def _without_far_years(text: pl.Series, year: pl.Series) -> pl.Series:
    """The texts, null where the year is none of four digits within `_NANOSECOND_YEARS`."""
    within = year.cast(pl.Int32, strict=False).is_between(*_NANOSECOND_YEARS)
    return text.set(within.not_().fill_null(True), None)
