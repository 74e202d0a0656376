"""Readers of the side files of the MovieLens sets: features of films and users.

Films have the columns ``item, title, year, genres`` and users ``user, gender, age, occupation, zip``. Columns are
categorical (strings), categorical lists (lists of strings) or numerical, except ``title``: its field metadata
``{b"kind": b"text"}`` marks it as text to show, not to learn from.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

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


def read_movies_dat(path: Path) -> pa.Table:
    """ML-1M's ``movies.dat``: ``item::title (year)::genre|genre``, Latin-1."""
    return _table(path, ITEM_SCHEMA, _movie, "::", 3)


def read_movies_csv(path: Path) -> pa.Table:
    """ML-20M's ``movies.csv``: ``movieId,title,genres`` with a header, quoted where needed, UTF-8."""
    return _table(path, ITEM_SCHEMA, _movie, ",", 3, "movieId,title,genres")


def read_u_item(path: Path) -> pa.Table:
    """ML-100K's ``u.item``: ``item|title (year)|date|video date|url`` and 19 flags of genres, Latin-1."""

    def film(fields: list[str]) -> _Row:
        flags = fields[5:]
        if set(flags) - {"0", "1"}:
            raise ValueError("a genre flag is neither 0 nor 1")
        genres = [genre for genre, flag in zip(GENRES_100K, flags) if flag == "1" and genre not in _NO_GENRES]
        return [fields[0], *_title_and_year(fields[1]), genres]

    return _table(path, ITEM_SCHEMA, film, "|", 5 + len(GENRES_100K))


def read_item_tsv(path: Path) -> pa.Table:
    """Tab-separated films with the header ``item_id:token, movie_title:token_seq, release_year:token,
    class:token_seq``; genres are separated by spaces."""

    def film(fields: list[str]) -> _Row:
        year = float(fields[2]) if fields[2].isdigit() else None
        return [fields[0], fields[1], year, [genre for genre in fields[3].split() if genre not in _NO_GENRES]]

    return _table(path, ITEM_SCHEMA, film, "\t", 4, "item_id:token")


def read_users_dat(path: Path) -> pa.Table:
    """ML-1M's ``users.dat``: ``user::gender::age::occupation::zip``."""
    return _table(path, USER_SCHEMA, lambda fields: [*fields], "::", 5)


def read_u_user(path: Path) -> pa.Table:
    """ML-100K's ``u.user``: ``user|age|gender|occupation|zip``; ages fall into ML-1M's buckets."""

    def person(fields: list[str]) -> _Row:
        user, age, gender, occupation, zip_code = fields
        # ML-1M names a bucket by its lower end, except that everybody under 18 is "1".
        bucket = max((low for low in (18, 25, 35, 45, 50, 56) if int(age) >= low), default=1)
        return [user, gender, str(bucket), occupation, zip_code]

    return _table(path, USER_SCHEMA, person, "|", 5)


def _movie(fields: list[str]) -> _Row:
    item, title, genres = fields
    return [item, *_title_and_year(title), [genre for genre in genres.split("|") if genre not in _NO_GENRES]]


def _title_and_year(text: str) -> tuple[str, float | None]:
    """``Toy Story (1995)`` is ("Toy Story", 1995.0); a title without a year keeps its text."""
    found = _YEAR.search(text)
    return (text[: found.start()].strip(), float(found[1])) if found else (text.strip(), None)


def _table(
    path: Path,
    schema: pa.Schema,
    parse: Callable[[list[str]], _Row],
    delimiter: str,
    count: int,
    header: str | None = None,
) -> pa.Table:
    """The rows of a file of ``count`` fields a line. header: how line 1 begins, if it is one; a CSV must have it."""
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
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as fault:
        raise UserError(f"{path}: cannot be read ({fault})") from None
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path}: longer than {MAX_BYTES} bytes{' unpacked' * packed}; not a MovieLens side file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
