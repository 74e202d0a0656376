"""Layout of raw files: which column is the user, the item, the rating, the time or a further event column.

Nothing is guessed that can be wrong: columns are found by the names of a header or by ``--columns``, and a column that
could be the time is used or refused, never dropped in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from absl import logging

from generative_recommenders.data.readers import times
from generative_recommenders.data.schema import KINDS, KNOWN, KNOWN_KINDS
from generative_recommenders.errors import UserError

if TYPE_CHECKING:
    from generative_recommenders.data.readers.tables import TableSource

SKIP = "_"
KNOWN_NAMES = {
    "user": "user userid user_id uid reviewerid reviewer_id customer_id customerid visitorid visitor_id sessionid "
    "session_id",
    "item": "item itemid item_id iid movieid movie_id parent_asin asin product_id productid isbn book_id business_id "
    "article_id app_id venue_id location_id",
    "rating": "rating ratings stars score overall",
    "timestamp": "timestamp time ts datetime date event_time eventtime created_at unixreviewtime unix_time visit_time "
    "visittime date_seconds date_added review_time timeframe",
}
"""Names of headers, compared in lower case and without RecBole's ``:type``. Two columns for one role are refused."""
_SECOND = {"asin": "parent_asin", **dict.fromkeys(("sessionid", "session_id"), "user userid user_id uid")}
"""Names that give way to others, with a warning: variants of a product, which Amazon's published benchmarks of 2023
take for one item, and sessions of users who are named."""
_KIND_OF = {**KNOWN_KINDS, "user": "id", "item": "id"}
_TIME_LIKE = re.compile(r"time|date|(^|[_ -])ts($|[_ -])", re.IGNORECASE)
_YEARS = (946_684_800, 4_102_444_800)  # 2000 to 2100: numbers in between, in any unit, may be times


@dataclass(frozen=True)
class ColumnRequest:
    """An entry of ``--columns``: ``NAME[=FILE_COLUMN][:KIND]``."""

    name: str
    file_column: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Column:
    """A column that is read: its name in the prepared data, its kind ("id" for user and item), its place in the file
    from 0."""

    name: str
    kind: str
    place: int
    header: str | None = None

    def __str__(self) -> str:
        shown = f"column {self.place + 1}" + (f" {self.header!r}" if self.header is not None else "")
        return f"{'time' if self.name == 'timestamp' else self.name} = {shown}"


Requests = Sequence[ColumnRequest | None]


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
        if kind is not None and name in KNOWN and (name, kind) != ("timestamp", "time"):
            raise UserError(f"--columns: {name} has its own kind; write {name} without {':' + kind!r}")
        requests.append(ColumnRequest(name, file_column, kind))
    names = [each.name for each in requests if each is not None]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--columns names {name!r} twice; name every column once")
    return requests


def find_columns(source: TableSource, requests: Requests | None) -> list[Column]:
    """The columns of a file that are read: of known names, or as ``--columns`` says, by name or by place.

    UserError: nothing says what the columns are, one is not there, two are for one role, a possible time is not used.
    """
    path, header = source.path, source.header
    if requests is None:
        if header is None:
            shown = "  ".join(f"{place}: {text[:40]!r}" for place, text in enumerate(source.first_fields, 1))
            raise UserError(
                f"{path}: line 1 is no header with known names; it splits into {shown}; say what the columns are, as "
                "--columns=user,item,rating,timestamp with _ for one to skip; where line 1 names them, say which is "
                f"what, as --columns='user={source.first_fields[0][:40]},item=...'"
            )
        found = [(ColumnRequest(role), places) for role in KNOWN if (places := _known_places(header, role))]
    elif header is None or not is_named(requests, header) or _tell_places(requests, source.sample.width):
        _check_places(path, header, source.sample.width, requests)
        found = [(request, [place]) for place, request in enumerate(requests) if request is not None]
    else:
        found = [(request, _places(header, request)) for request in requests if request is not None]
    columns = [_column(path, request, places, header) for request, places in found]
    for role in ("user", "item"):
        if role not in [column.name for column in columns]:
            among = "" if header is None else f" among: {', '.join(header)[:200]}"
            raise UserError(f"{path}: no {role}{among}; name the columns, as --columns=user=...,item=...")
    places = [column.place for column in columns]
    for column in columns:
        same = [repr(each.header) for each in columns if each.name == column.name]
        if len(same) > 1:
            raise UserError(
                f"{path}: {' and '.join(same)} may each be the {column.name}; name one of them in --columns"
            )
        if column.header and (header or []).count(column.header) > 1:
            raise UserError(f"{path}: several columns are called {column.header!r}; rename all but one")
        if places.count(column.place) > 1:
            name = column.header or f"column {column.place + 1}"
            raise UserError(f"{path}: {name!r} is taken for two columns; name the right ones with --columns")
    if requests is None:
        _refuse_unused_times(source, columns)
    return columns


def _tell_places(requests: Requests, num_fields: int) -> bool:
    """Whether the requests are bare names, one for every column and some to skip: they then tell places, whatever the
    header calls the columns."""
    bare = all(each is None or each == ColumnRequest(each.name) for each in requests)
    return bare and len(requests) == num_fields and None in requests


def _check_places(path: Path, header: Sequence[str] | None, num_fields: int, requests: Requests) -> None:
    """UserError where requests cannot be those of the file's columns in their order, whose header must not
    contradict."""
    for request, name in zip(requests, header or ()):
        role = _role_of(name)
        if request is not None and request.name in KNOWN_NAMES and role not in (None, request.name):
            raise UserError(
                f"{path}: column {name!r} is in the place of the {request.name}; write --columns={role}={name},..."
            )
    if len(requests) != num_fields:
        raise UserError(
            f"{path}: {num_fields} fields a line, but --columns names {len(requests)}; name every one, "
            "with _ to skip one"
        )
    for request in filter(None, requests):
        if request.file_column is not None:
            raise UserError(
                f"{path}: no column {request.file_column!r}: line 1 is no header; --header=yes says that it is"
            )


def is_named(requests: Requests, header: Sequence[str]) -> bool:
    """Whether the requests name columns of the header: by their own names, or by known names of user and item."""
    given = [each for each in requests if each is not None]
    return any(each.file_column is not None or _places(header, each) for each in given)


def has_known_names(fields: Sequence[str]) -> bool:
    """Whether fields of a first line name the user and the item."""
    return all(_known_places(fields, role) for role in ("user", "item"))


def normalise(name: str) -> str:
    """``userId:token``, ``User ID`` and ``user-id`` as the known names spell it."""
    return re.sub(r"[ -]+", "_", name.strip().strip("\"'").lower().split(":")[0])


def _known_places(header: Sequence[str], role: str) -> list[int]:
    """Where columns of known names of a role are, the most usual name first; of equal columns the first."""
    plain = {header.index(name): normalise(name) for name in header}
    return [place for known in KNOWN_NAMES[role].split() for place, name in plain.items() if name == known]


def _places(header: Sequence[str], request: ColumnRequest) -> list[int]:
    """The places of a requested column: of its file column or own name, or else of all known names of its role."""
    wanted = request.file_column or request.name
    if wanted in header:
        return [list(header).index(wanted)]
    if request.file_column is None and request.name in KNOWN_NAMES:
        return _known_places(header, request.name)
    plain = [normalise(name) for name in header]
    return [plain.index(normalise(wanted))] if normalise(wanted) in plain else []


def _one_place(path: Path, header: Sequence[str], role: str, places: Sequence[int]) -> int:
    """The place of a role that several columns may have; UserError where none of them comes first."""
    plain = {place: normalise(header[place]) for place in places}
    first = [place for place in places if not set(_SECOND.get(plain[place], "").split()) & set(plain.values())]
    chosen = header[first[0]]
    names = [repr(header[place]) for place in (first if len(first) > 1 else places)]
    if len(first) > 1:
        raise UserError(
            f"{path}: {' and '.join(names)} may each be the {role}; say which with --columns, as {role}={chosen}"
        )
    shown = ", ".join(names)
    logging.warning("%s: of %s the %s is %r; %s= in --columns takes another", path, shown, role, chosen, role)
    return first[0]


def _column(path: Path, request: ColumnRequest, places: Sequence[int], header: Sequence[str] | None) -> Column:
    """A requested column, which may lie at any of the places; UserError where it is none, or not one."""
    if not places:
        assert header is not None
        wanted = request.file_column or request.name
        close = difflib.get_close_matches(wanted, list(header), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{path}: no column {wanted!r} among: {', '.join(header)[:200]}{hint}")
    place = _one_place(path, header, request.name, places) if header and len(places) > 1 else places[0]
    name, kind = request.name, request.kind or _KIND_OF.get(request.name)
    role = _role_of(name)
    if kind is None and role is not None and header is not None and request.file_column is None:
        name, kind = role, _KIND_OF[role]  # --columns names it as the header does
    if kind is None:
        known = ", ".join(f"{name}:{each}" for each in KINDS)
        raise UserError(
            f"{path}: --columns: what is {name!r}? Write user, item, rating or timestamp={name}, or a kind "
            f"({known}), or _ to skip it"
        )
    return Column(name, kind, place, header[place] if header else None)


def _role_of(name: str) -> str | None:
    """Whose known name this is."""
    return next((role for role, names in KNOWN_NAMES.items() if normalise(name) in names.split()), None)


def _refuse_unused_times(source: TableSource, columns: list[Column]) -> None:
    """UserError naming a column that is not read and may be the time: by its name, its type or its values."""
    header, has_time = source.header or [], any(column.name == "timestamp" for column in columns)
    for place in sorted({*range(len(header))} - {column.place for column in columns}):
        values = source.sample[str(place)]
        form = times.recognise(values) if len(values.drop_nulls()) else None
        by_value = form is not None and (form.text is not None or values.dtype.is_temporal())
        if form is not None and not by_value:  # numbers: all of them in the years of today's data
            found = times.to_nanoseconds(values, form).drop_nulls()
            low, high = (year * 10**9 for year in _YEARS)
            by_value = len(found) == len(values.drop_nulls()) and bool(found.is_between(low, high).all())
        if by_value or (not has_time and form is not None and _TIME_LIKE.search(header[place])):
            own = ",".join(f"{column.name}={column.header}" for column in columns)
            raise UserError(
                f"{source.path}: column {header[place]!r} may be the time and would be left out; name the columns, as "
                f"--columns={own},timestamp={header[place]} (or --columns={own} to leave it out)"
            )
