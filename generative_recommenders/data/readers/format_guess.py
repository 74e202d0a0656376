"""The layout of delimited text that nobody described: its delimiter, header and columns, from its first lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from generative_recommenders.data.readers.column_roles import (
    Roles,
    check_places,
    check_roles,
    roles_by_name,
    say_header,
    say_left_out,
    split_entry,
)
from generative_recommenders.data.readers.delimited import FirstLines, first_delimiter, first_lines
from generative_recommenders.data.readers.ratings_table import ROLES, ReaderFormat
from generative_recommenders.data.readers.strict_lines import (
    is_well_quoted,
    looks_like_header,
    resembles_number,
    split_line,
)
from generative_recommenders.errors import UserError

SAMPLE_LINES = 100
WHITESPACE = " "
"""How runs of spaces and tabs are asked for, which a ``ReaderFormat`` writes as None."""
CANDIDATES = ("::", "\t", ",", ";", "|", None)
CERTAIN, NONE = 2, -1


def sniff(path: Path, columns: Sequence[str] | None, delimiter: str | None = None) -> ReaderFormat:
    """See ``ratings_table.sniff_format``."""
    sample = first_lines(path, SAMPLE_LINES)
    if delimiter is None:
        separator = _guess_delimiter(path, sample, columns)
    else:
        separator = None if delimiter == WHITESPACE else delimiter
    fields = split_line(sample.lines[0], separator)
    layout = _layout(path, sample.number, fields, separator, columns)
    _warn_of_header(path, sample, fields, layout, f"give --columns={','.join(_named(fields, layout))}")
    if layout.has_header and (columns is None or _are_names(columns, fields)):
        say_left_out(path, fields, layout.columns or ())
    elif layout.has_header:
        say_header(f"{path}, line {sample.number}", sample.lines[0], fields)
    return layout


def sniff_pairs(path: Path) -> ReaderFormat:
    """Lines of a user and an item with or without a header."""
    sample = first_lines(path, 1)
    fields = split_line(sample.lines[0], None)
    roles = ("user", "item")
    layout = _layout_by_place(f"{path}, line {sample.number}", fields, None, roles, has_header=False)
    _warn_of_header(path, sample, fields, layout, "remove it")
    return layout


def check_headerless(path: Path, layout: ReaderFormat, first: Path) -> None:
    """UserError if the text file begins with a header where that of ``layout``, ``first``, does not."""
    sample = first_lines(path, 1)
    if looks_like_header(split_line(sample.lines[0], layout.delimiter), layout.columns or ()):
        line = sample.lines[0][:200]
        raise UserError(
            f"{path}, line {sample.number}: `{line}` looks like a header, and {first} has none; remove it"
        )


def _layout(
    path: Path, number: int, fields: list[str], delimiter: str | None, columns: Sequence[str] | None
) -> ReaderFormat:
    """What line ``number`` (the first), split into ``fields``, says of the file."""
    if columns is None:
        if looks_like_header(fields, ROLES[: len(fields)]):
            return ReaderFormat(delimiter, True, roles_by_name(path, fields), tuple(fields))
        return ReaderFormat(delimiter, False, _roles_by_position(path, number, fields))
    if _are_names(columns, fields):
        return ReaderFormat(delimiter, True, roles_by_name(path, fields, columns), tuple(fields))
    where = f"{path}, line {number}"
    given = set(columns)
    if not {"user", "item"} <= given and (given & set(fields) or not given & set(ROLES)):
        missing = next(name for name in columns if name not in fields)
        raise UserError(
            f"{where}: no column {missing!r} among: {', '.join(fields)[:200]}; --columns must give names that are "
            "there, or user and item in their places"
        )
    roles = check_roles(path, [name if name in ROLES else None for name in columns])
    if len(columns) != len(fields):
        raise UserError(
            f"{where}: {len(fields)} fields, but --columns names {len(columns)} (any word skips one)"
        )
    return _layout_by_place(where, fields, delimiter, roles, has_header=None)


def _are_names(columns: Sequence[str], fields: list[str]) -> bool:
    """Whether --columns gives names of the header, not places."""
    entries = [split_entry(entry) for entry in columns]
    return all(name in fields for _, name in entries) or any(role is not None for role, _ in entries)


def _layout_by_place(
    where: str, fields: list[str], delimiter: str | None, roles: Roles, has_header: bool | None
) -> ReaderFormat:
    """Line 1 is a header of these roles, or data: then the layout says ``has_header``."""
    if not looks_like_header(fields, roles):
        return ReaderFormat(delimiter, has_header, roles)
    check_places(where, fields, roles)
    return ReaderFormat(delimiter, True, roles, tuple(fields))


def _roles_by_position(path: Path, number: int, fields: list[str]) -> Roles:
    if not 2 <= len(fields) <= len(ROLES):
        raise UserError(
            f"{path}, line {number}: {len(fields)} fields and no header; say what they are with --columns"
        )
    return ROLES[: len(fields)]


@dataclass(frozen=True)
class _Reading:
    """Lines of which one delimiter splits most into equally many fields, two or more.

    evidence: numeric columns, `CERTAIN` if the columns are named, `NONE` if these are no ratings.
    """

    delimiter: str | None
    num_fields: int
    evidence: int


def _guess_delimiter(path: Path, sample: FirstLines, columns: Sequence[str] | None) -> str | None:
    """The delimiter that makes ratings of the lines; if none does, one by which reading them fails."""
    every = [_read(path, sample, delimiter, columns) for delimiter in CANDIDATES]
    readings = [reading for reading in every if reading is not None]
    fitting = [reading for reading in readings if reading.evidence != NONE]
    if not fitting:
        return readings[0].delimiter if readings else first_delimiter(sample.lines[0])
    possible = _possible(readings, fitting)
    if len(possible) > 1:
        names = " or ".join(
            f"{_shown(reading.delimiter)} ({reading.num_fields} fields)" for reading in possible
        )
        raise UserError(f"{path}: the delimiter may be {names}; say which with --delimiter")
    return possible[0].delimiter


def _possible(readings: list[_Reading], fitting: list[_Reading]) -> list[_Reading]:
    """One reading if it is clearly right, else all that compete.

    Two numeric columns, or columns that are named, settle it, and a tab settles it against what has no more
    numbers. With one numeric column whatever fits may be meant, and without any whatever divides the lines:
    the other delimiter is part of an id then. Blanks are taken for a part of ids where anything else fits.
    """
    most = max(reading.evidence for reading in fitting)
    best = [reading for reading in fitting if reading.evidence == most]
    if most == CERTAIN:
        return _marks(best)
    strongest = max(_marks(fitting), key=lambda reading: (reading.evidence, reading.delimiter == "\t"))
    if strongest.delimiter == "\t":
        return [strongest]
    if most == 0:
        return _marks(readings)
    return fitting if best[0].delimiter is None else _marks(fitting)


def _marks(readings: list[_Reading]) -> list[_Reading]:
    """Those by other delimiters than blanks, if there are any."""
    return [reading for reading in readings if reading.delimiter is not None] or readings


def _read(
    path: Path, sample: FirstLines, delimiter: str | None, columns: Sequence[str] | None
) -> _Reading | None:
    rows = [split_line(line, delimiter) for line in sample.lines]
    num_fields = len(rows[0])
    whole = sum(
        len(row) == num_fields and is_well_quoted(line, delimiter) for row, line in zip(rows, sample.lines)
    )
    if num_fields < 2 or 2 * whole <= len(rows):
        return None
    if whole < len(rows):
        return _Reading(delimiter, num_fields, NONE)
    try:
        layout = _layout(path, sample.number, rows[0], delimiter, columns)
    except UserError:
        return _Reading(delimiter, num_fields, NONE)
    return _Reading(delimiter, num_fields, _evidence(rows, layout, columns is not None))


def _evidence(rows: list[list[str]], layout: ReaderFormat, named: bool) -> int:
    roles = layout.columns or ()
    headed = looks_like_header(rows[0], roles) if layout.has_header is None else layout.has_header
    numeric = [place for place, role in enumerate(roles) if role in ("rating", "timestamp")]
    if not all(resembles_number(row[place]) for row in rows[headed:] for place in numeric):
        return NONE
    return CERTAIN if named or headed else len(numeric)


def _shown(delimiter: str | None) -> str:
    return "whitespace" if delimiter is None else repr(delimiter)


def _named(fields: list[str], layout: ReaderFormat) -> list[str]:
    """The fields of line 1 in the order of --columns."""
    roles = layout.columns or ()
    return [fields[roles.index(role)] for role in ROLES if role in roles]


def _warn_of_header(
    path: Path, sample: FirstLines, fields: list[str], layout: ReaderFormat, remedy: str
) -> None:
    """Say that line 1 is data where nothing tells names from ids: no column of numbers, no known name."""
    roles = layout.columns or ()
    if layout.has_header or "rating" in roles or "timestamp" in roles or all(map(resembles_number, fields)):
        return
    logging.warning(
        "%s, line %d: `%s` is read as data; if it is a header, %s",
        path,
        sample.number,
        sample.lines[0][:200],
        remedy,
    )
