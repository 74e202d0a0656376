"""Layout of raw files: which column is the user, the item, the rating, the time or a further event column.

Nothing is guessed that can be wrong: columns are found by the names of a header or by ``--columns``, and a column that could
be the time is used or refused, never dropped in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from absl import logging

from generative_recommenders.data.readers import times
from generative_recommenders.data.schema import KINDS, KNOWN
from generative_recommenders.errors import UserError

SKIP = "_"
KNOWN_NAMES = {
    "user": "user userid user_id uid reviewerid reviewer_id customer_id customerid visitorid visitor_id sessionid session_id",
    "item": "item itemid item_id iid movieid movie_id parent_asin asin product_id productid isbn book_id business_id "
    "article_id app_id venue_id location_id",
    "rating": "rating ratings stars score overall",
    "timestamp": "timestamp time ts datetime date event_time eventtime created_at unixreviewtime unix_time visit_time "
    "visittime date_seconds date_added review_time timeframe",
}
"""Names of headers, compared in lower case and without RecBole's ``:type``. Two columns for one role are refused."""
_SECOND = {"asin": "parent_asin", **dict.fromkeys(("sessionid", "session_id"), "user userid user_id uid")}
"""Names that give way to others, with a warning: variants of a product, which Amazon's published benchmarks of 2023 take for
one item, and sessions of users who are named."""
_TIME_LIKE = re.compile(r"(^|[_ -])(time|date|ts|datetime|timestamp)($|[_ -])|time|date", re.IGNORECASE)
_YEARS = (946_684_800, 4_102_444_800)  # 2000 to 2100: numbers in between, in any unit, may be times


@dataclass(frozen=True)
class ColumnRequest:
    """An entry of ``--columns``: ``NAME[=FILE_COLUMN][:KIND]``."""

    name: str
    file_column: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Column:
    """A column that is read: its name in the prepared data, its kind ("id" for user and item), its place in the file from 0."""

    name: str
    kind: str
    place: int
    header: str | None = None

    def __str__(self) -> str:
        shown = f"column {self.place + 1}" + (f" {self.header!r}" if self.header is not None else "")
        return f"{'time' if self.name == 'timestamp' else self.name} = {shown}"


@dataclass(frozen=True)
class Layout:
    """The columns of a file that are read, and the names of those that are left out."""

    columns: tuple[Column, ...]
    left_out: tuple[str, ...] = field(default=())


def parse_columns(text: str) -> list[ColumnRequest | None]:
    """The entries of ``--columns``, None for a column that is skipped; UserError naming the entry at fault."""
    requests: list[ColumnRequest | None] = []
    for entry in (part.strip() for part in text.split(",")):
        if entry == SKIP:
            requests.append(None)
            continue
        match = re.fullmatch(r"([^=]+?)(?:=(.+?))?(?::(categorical|numerical|time))?", entry)
        if match is None:
            raise UserError(
                f"--columns: {entry!r} is no entry; write NAME, NAME=COLUMN or NAME:KIND ({', '.join(KINDS)})"
            )
        name, file_column, kind = match.groups()
        if kind is not None and name in ("user", "item", "rating"):
            raise UserError(f"--columns: {name} has its own kind; write {name} without {':' + kind!r}")
        requests.append(ColumnRequest(name, file_column, kind))
    names = [each.name for each in requests if each is not None]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--columns names {name!r} twice; name every column once")
    return requests


def by_header(
    path: Path, header: Sequence[str], sample: pl.DataFrame, requests: list[ColumnRequest | None] | None
) -> Layout:
    """The layout of a file whose columns are named.

    header: the names, in file order. sample: the first rows, columns in the same order. UserError: columns that are not there,
    two for one role, a possible time that is not used.
    """
    if requests is None:
        columns = _by_known_names(path, header)
    else:
        columns = [_named_column(path, header, each) for each in requests if each is not None]
    _check(path, columns, header)
    used = {column.place for column in columns}
    rest = [place for place in range(len(header)) if place not in used]
    if requests is None:
        _refuse_unused_times(path, header, sample, columns, rest)
    return Layout(tuple(columns), tuple(header[place] for place in rest))


def by_place(
    path: Path, requests: Sequence[ColumnRequest | None], num_fields: int, header: Sequence[str] | None
) -> Layout:
    """The layout of a file whose columns ``requests`` name in file order."""
    if len(requests) != num_fields:
        raise UserError(
            f"{path}: {num_fields} fields a line, but --columns names {len(requests)}; name every one, with _ to skip one"
        )
    columns = []
    for place, request in enumerate(requests):
        if request is None:
            continue
        if request.file_column is not None:
            raise UserError(
                f"{path}: no column {request.file_column!r}: line 1 is no header; --header=yes says that it is"
            )
        columns.append(_column(path, request, place, header[place] if header else None))
    _check(path, columns, header or [])
    return Layout(tuple(columns))


def is_named(requests: Sequence[ColumnRequest | None], header: Sequence[str]) -> bool:
    """Whether the requests name columns of the header: by their own names, or by known names of user and item."""
    given = [each for each in requests if each is not None]
    return any(each.file_column is not None or _find(header, each) for each in given)


def has_known_names(fields: Sequence[str]) -> bool:
    """Whether fields of a first line name the user and the item."""
    names = [normalise(name) for name in fields]
    return all(set(KNOWN_NAMES[role].split()) & set(names) for role in ("user", "item"))


def normalise(name: str) -> str:
    """``userId:token``, ``User ID`` and ``user-id`` as the known names spell it."""
    return re.sub(r"[ -]+", "_", name.strip().strip("\"'").lower().split(":")[0])


def _find(header: Sequence[str], request: ColumnRequest) -> list[int]:
    """The places of a requested column: of its file column or own name, or else of all known names of its role."""
    wanted = request.file_column or request.name
    if wanted in header:
        return [list(header).index(wanted)]
    plain = [normalise(name) for name in header]
    if request.file_column is None and request.name in KNOWN_NAMES:
        return [plain.index(each) for each in KNOWN_NAMES[request.name].split() if each in plain]
    return [plain.index(normalise(wanted))] if normalise(wanted) in plain else []


def _one_place(path: Path, header: Sequence[str], role: str, places: Sequence[int]) -> int:
    """The place of a role; UserError where several columns may have it."""
    plain = {place: normalise(header[place]) for place in places}
    first = [
        place for place in places if not set(_SECOND.get(plain[place], "").split()) & set(plain.values())
    ]
    names = [repr(header[place]) for place in (first if len(first) > 1 else places)]
    if len(first) > 1:
        raise UserError(
            f"{path}: {' and '.join(names)} may each be the {role}; say which with --columns, as {role}={header[first[0]]}"
        )
    if len(places) > 1:
        logging.warning(
            "%s: of %s the %s is %r; %s= in --columns takes another",
            path,
            ", ".join(names),
            role,
            header[first[0]],
            role,
        )
    return first[0]


def _named_column(path: Path, header: Sequence[str], request: ColumnRequest) -> Column:
    places = _find(header, request)
    if not places:
        wanted = request.file_column or request.name
        close = difflib.get_close_matches(wanted, list(header), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{path}: no column {wanted!r} among: {', '.join(header)[:200]}{hint}")
    place = _one_place(path, header, request.name, places)
    return _column(path, request, place, header[place])


def _column(path: Path, request: ColumnRequest, place: int, header: str | None) -> Column:
    if request.name in ("user", "item"):
        return Column(request.name, "id", place, header)
    if request.name == "rating":
        return Column(request.name, "numerical", place, header)
    kind = request.kind or ("time" if request.name == "timestamp" else None)
    if kind is None:
        role = next(
            (role for role, names in KNOWN_NAMES.items() if normalise(request.name) in names.split()), None
        )
        if role is not None and header is not None and request.file_column is None:
            return _column(path, ColumnRequest(role), place, header)
        known = ", ".join(f"{request.name}:{each}" for each in KINDS)
        raise UserError(
            f"{path}: --columns: what is {request.name!r}? Write user, item, rating or timestamp={request.name}, or a kind "
            f"({known}), or _ to skip it"
        )
    return Column(request.name, kind, place, header)


def _by_known_names(path: Path, header: Sequence[str]) -> list[Column]:
    plain = [normalise(name) for name in header]
    columns = []
    for role in KNOWN:
        places = [plain.index(each) for each in KNOWN_NAMES[role].split() if each in plain]
        if places:
            place = _one_place(path, header, role, places)
            columns.append(_column(path, ColumnRequest(role), place, header[place]))
        elif role in ("user", "item"):
            raise UserError(
                f"{path}: no {role} among: {', '.join(header)[:200]}; name the columns, as "
                "--columns=user=...,item=..."
            )
    return columns


def _refuse_unused_times(
    path: Path, header: Sequence[str], sample: pl.DataFrame, columns: list[Column], rest: Sequence[int]
) -> None:
    """UserError naming a column that is not read and may be the time: by its name, its type or its values."""
    has_time = any(column.name == "timestamp" for column in columns)
    for place in rest:
        values = sample[sample.columns[place]]
        form = times.recognise(values) if len(values.drop_nulls()) else None
        by_value = form is not None and (form.text is not None or values.dtype.is_temporal())
        if form is not None and not by_value:  # numbers: all of them in the years of today's data
            found = times.to_nanoseconds(values, form).drop_nulls()
            low, high = (year * 10**9 for year in _YEARS)
            by_value = len(found) == len(values.drop_nulls()) and bool(found.is_between(low, high).all())
        if by_value or (not has_time and form is not None and _TIME_LIKE.search(header[place])):
            own = ",".join(f"{column.name}={column.header}" for column in columns)
            raise UserError(
                f"{path}: column {header[place]!r} may be the time and would be left out; name the columns, as "
                f"--columns={own},timestamp={header[place]} (or --columns={own} to leave it out)"
            )


def _check(path: Path, columns: Sequence[Column], header: Sequence[str]) -> None:
    """UserError unless user and item are there and no column is taken twice."""
    for role in ("user", "item"):
        if role not in [column.name for column in columns]:
            raise UserError(
                f"{path}: no column is the {role}; name it with --columns, as --columns=user=...,item=..."
            )
    places = [column.place for column in columns]
    for column in columns:
        if column.header and list(header).count(column.header) > 1:
            raise UserError(f"{path}: several columns are called {column.header!r}; rename all but one")
        if places.count(column.place) > 1:
            name = header[column.place] if header else f"column {column.place + 1}"
            raise UserError(f"{path}: {name!r} is taken for two columns; name the right ones with --columns")


def check_places(path: Path, requests: Sequence[ColumnRequest | None], header: Sequence[str]) -> None:
    """UserError if a column's place says one role and its known name in the header another."""
    for request, name in zip(requests, header):
        if request is None or request.name not in KNOWN_NAMES:
            continue
        for role, names in KNOWN_NAMES.items():
            if role != request.name and normalise(name) in names.split():
                raise UserError(
                    f"{path}: column {name!r} is in the place of the {request.name}; write --columns={role}={name},..."
                )
