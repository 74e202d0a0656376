"""Raw ratings: where they lie, how they are read, and the typed columns that reading yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from generative_recommenders.errors import UserError

ROLES = ("user", "item", "rating", "timestamp")
MAX_TIMESTAMP = 7_258_118_400
"""2200-01-01 in seconds since 1970; a later time is taken for an error (milliseconds, most often)."""


@dataclass(frozen=True)
class ReaderFormat:
    """How one file of ratings is laid out; for Parquet only ``columns`` counts.

    delimiter: the separator (``::`` and other long ones allowed), or None for runs of spaces and tabs.
    has_header: whether line 1 names the columns; None looks at line 1 and decides. columns: the role of every
    column, in file order: ``user``, ``item``, ``rating``, ``timestamp``, or None for
        a column that is not needed. None in place of the tuple: roles are found by the names in the header
        (or in the Parquet schema).
    names: what the header (or the schema) calls these columns, if that is known: every file must have them,
        each in its own order. None: a header that must be there names the roles in the words that are known.
    """

    delimiter: str | None = ","
    has_header: bool | None = None
    columns: tuple[str | None, ...] | None = ("user", "item", "rating", "timestamp")
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RawRatings:
    """Ratings before preparation, with what is known about them.

    files: delimited text (gzip or not, by content) or Parquet; several are read in order.
    filter: ``amazon_five``, ``none`` or ``k_core:K``.
    item_features: column ``item`` (original ids, string) and feature columns: string = categorical, list of
        strings = categorical list, float or integer = numerical. user_features likewise with ``user``.
    expected_items, expected_users: counts after preparation; checked when given.
    source: description that the manifest keeps (JSON-able; checksums).
    """

    name: str
    files: list[Path]
    format: ReaderFormat = field(default_factory=ReaderFormat)
    filter: str = "none"
    item_features: pa.Table | None = None
    user_features: pa.Table | None = None
    expected_items: int | None = None
    expected_users: int | None = None
    source: dict[str, Any] = field(default_factory=dict)


def read_batches(raw: RawRatings) -> Iterator[pa.Table]:
    """Yield the ratings in (file, row) order, a bounded number of rows at a time.

    Columns: ``user``, ``item`` large_string, and where the files have them ``rating`` float32 (finite) and
    ``timestamp`` int64 (seconds, 0 to ``MAX_TIMESTAMP``). Raises UserError with file and line for bad input.
    """
    names: list[str] | None = None
    for path in raw.files:
        for table in read_file(path, raw.format):
            names = names or table.column_names
            if table.column_names != names:
                has, other = ", ".join(table.column_names), ", ".join(names)
                raise UserError(
                    f"{path}: it has {has}, but {raw.files[0]} has {other}; all files must have the same"
                )
            yield table


def read_file(path: Path, layout: ReaderFormat) -> Iterator[pa.Table]:
    """``read_batches`` for one file."""
    from generative_recommenders.data.readers import delimited as delimited_reader
    from generative_recommenders.data.readers import parquet as parquet_reader

    if parquet_reader.is_parquet(path):
        return parquet_reader.read(path, layout)
    return delimited_reader.read(path, layout)


def sniff_format(
    path: Path, columns: tuple[str, ...] | None = None, delimiter: str | None = None
) -> ReaderFormat:
    """The layout of any delimited or Parquet file: delimiter, header or not, the role of each column.

    columns: names in the file's header; ``timestamp=when`` says a name's role, a known name (``item``,
        ``movieId``) has its own, the others are those of user, item, rating, timestamp that are left, in this
        order. Or, for a file without these names, the roles in file order (any other word skips a column of
        text).
    delimiter: the separator of text, a blank for runs of spaces and tabs, None to guess it.
    """
    from generative_recommenders.data.readers import format_guess
    from generative_recommenders.data.readers import parquet as parquet_reader

    if not parquet_reader.is_parquet(path):
        return format_guess.sniff(path, columns, delimiter)
    if delimiter is not None:
        raise UserError(f"{path}: --delimiter is for text, and this is Parquet")
    return parquet_reader.sniff(path, columns)
