"""Readers of the side files of the MovieLens sets: features of films and users.

Films have the columns ``item, title, year, genres`` and users ``user, gender, age, occupation, zip``. Columns are
categorical (strings), categorical lists (lists of strings) or numerical, except ``title``: its field metadata
``{b"kind": b"text"}`` marks it as text to show, not to learn from.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from generative_recommenders.data.readers.files import READ_FAULTS, is_packed, open_unpacked
from generative_recommenders.errors import UserError

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The 19 flag columns of ``u.item``, in its order."""

MAX_BYTES = 256 << 20
"""Bound on the unpacked bytes of a side file; the largest published one has 1.4 million."""
_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
_NO_GENRES = {"", "(no genres listed)", "unknown"}

ITEM_SCHEMA = pa.schema([
    pa.field("item", pa.string(), nullable=False),
    pa.field("title", pa.string(), metadata={b"kind": b"text"}),
    pa.field("year", pa.float32()),
    pa.field("genres", pa.list_(pa.string())),
])  # fmt: skip
USER_SCHEMA = pa.schema([
    pa.field("user", pa.string(), nullable=False),
    *(pa.field(name, pa.string()) for name in ("gender", "age", "occupation", "zip")),
])  # fmt: skip

_Row = list[object]


def _movie(fields: list[str]) -> _Row:
    item, title, genres = fields
    return [item, *_title_and_year(title), [genre for genre in genres.split("|") if genre not in _NO_GENRES]]


def _movie_of_flags(fields: list[str]) -> _Row:
    flags = fields[5:]
    if set(flags) - {"0", "1"}:
        raise ValueError("a genre flag is neither 0 nor 1")
    genres = [genre for genre, flag in zip(GENRES_100K, flags) if flag == "1" and genre not in _NO_GENRES]
    return [fields[0], *_title_and_year(fields[1]), genres]


def _movie_of_words(fields: list[str]) -> _Row:
    item, title, year, genres = fields
    known = [genre for genre in genres.split() if genre not in _NO_GENRES]
    return [item, title, float(year) if year.isdigit() else None, known]


def _title_and_year(text: str) -> tuple[str, float | None]:
    """``Toy Story (1995)`` is ("Toy Story", 1995.0); a title without a year keeps its text."""
    found = _YEAR.search(text)
    return (text[: found.start()].strip(), float(found[1])) if found else (text.strip(), None)


def _person_with_age(fields: list[str]) -> _Row:
    user, age, gender, occupation, zip_code = fields
    # ML-1M names a bucket by its lower end, except that everybody under 18 is "1".
    bucket = max((low for low in (18, 25, 35, 45, 50, 56) if int(age) >= low), default=1)
    return [user, gender, str(bucket), occupation, zip_code]


class SideFile(NamedTuple):
    """Layout of a side file. fields: of a line; header: how line 1 begins, if it is one. A CSV must have it."""

    schema: pa.Schema
    parse: Callable[[list[str]], _Row]
    delimiter: str
    fields: int
    header: str | None = None


SIDE_FILES = {
    "movies.dat": SideFile(ITEM_SCHEMA, _movie, "::", 3),  # ML-1M
    "movies.csv": SideFile(ITEM_SCHEMA, _movie, ",", 3, "movieId,title,genres"),  # ML-20M
    "u.item": SideFile(ITEM_SCHEMA, _movie_of_flags, "|", 5 + len(GENRES_100K)),  # ML-100K
    "u.item.tsv": SideFile(ITEM_SCHEMA, _movie_of_words, "\t", 4, "item_id:token"),  # ML-100K as RecBole has it
    "users.dat": SideFile(USER_SCHEMA, list, "::", 5),  # ML-1M
    "u.user": SideFile(USER_SCHEMA, _person_with_age, "|", 5),  # ML-100K
}


def read_side_file(name: str, path: Path) -> pa.Table:
    """The rows of a file that is laid out as the published one of this name; gzip or not. UserError with file and
    line."""
    schema, parse, delimiter, count, header = SIDE_FILES[name]
    is_csv, text = delimiter == ",", _read_text(path)
    mark = "\x1f" if len(delimiter) > 1 else delimiter  # csv knows delimiters of one character alone
    reader = csv.reader(
        io.StringIO(text.replace(delimiter, mark), newline=""), delimiter=mark, strict=True,
        quoting=csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE,
    )  # fmt: skip
    rows: dict[str, _Row] = {}
    try:
        for fields in reader:
            if reader.line_num == 1 and header is not None and ",".join(fields).startswith(header):
                continue
            if reader.line_num == 1 and is_csv:
                raise ValueError(f"the header must be {header}")
            if not "".join(fields).strip() and len(fields) < 2:
                continue
            if len(fields) != count:
                raise ValueError(f"{len(fields)} fields instead of {count}, separated by {delimiter!r}")
            if not fields[0] or fields[0] in rows:
                raise ValueError(f"id {fields[0]} appears twice" if fields[0] else "the id is empty")
            rows[fields[0]] = parse(fields)
    except (ValueError, csv.Error) as fault:
        raise UserError(f"{path}, line {reader.line_num}: {fault}") from None
    if not rows:
        raise UserError(f"{path}: holds no rows")
    columns = zip(*rows.values())
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema)], schema=schema)


def _read_text(path: Path) -> str:
    """Text of a file, gzip or not: UTF-8, else Latin-1, which the older sets are in."""
    try:
        with open_unpacked(path) as stream:
            content = stream.read(MAX_BYTES + 1)
    except READ_FAULTS as fault:
        raise UserError(f"{path}: cannot be read ({fault})") from None
    if len(content) > MAX_BYTES:
        unpacked = " unpacked" * is_packed(path)
        raise UserError(f"{path}: longer than {MAX_BYTES} bytes{unpacked}; not a MovieLens side file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:  # what is not UTF-8 fails at its first accent; Latin-1 would take anything
        return content.decode("latin-1")
