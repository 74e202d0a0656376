"""Delimited text (CSV, TSV, ``::``, spaces; gzip or not) to typed columns, with the line of the first fault.

Two parsers stand behind one entrance. The strict one (``strict_lines``) goes line by line and is the
definition of what is accepted. The fast one (polars) takes a block of lines at once; whenever a block is in
any doubt (quotes, a field that does not parse, a missing value, a count of rows that differs from the count
of lines) the block is given to the strict one, which returns its rows or names the line at fault.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa

from generative_recommenders.data.readers.column_roles import (
    Roles,
    check_header,
    check_places,
    check_roles,
    roles_by_name,
    roles_like_first,
    say_header,
)
from generative_recommenders.data.readers.ratings_table import MAX_TIMESTAMP, ROLES, ReaderFormat
from generative_recommenders.data.readers.strict_lines import looks_like_header, parse_lines, split_line
from generative_recommenders.errors import UserError

BLOCK_BYTES = 32 << 20
MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
_UNIT_SEPARATOR = "\x1f"
_POLARS_TYPES = {"user": pl.String, "item": pl.String, "rating": pl.Float32, "timestamp": pl.Int64}


@dataclass(frozen=True)
class Block:
    """Whole lines of a file with ``\\n`` line ends; the first is line ``first_line`` (1-based)."""

    data: bytes
    first_line: int


def read(path: Path, layout: ReaderFormat) -> Iterator[pa.Table]:
    """Yield the file's rows in order (see ``ratings_table.read_batches``); UserError for bad input."""
    roles: Roles | None = None
    rows = 0
    for block in _without_blank_start(read_blocks(path)):
        body = block
        if roles is None:
            body, roles = _take_header(path, block, layout)
        table = parse_fast(body, layout.delimiter, roles)
        if table is None:
            table = parse_lines(path, body.data, body.first_line, layout.delimiter, roles)
        rows += table.num_rows
        if table.num_rows:
            yield table
    if rows == 0:
        raise UserError(f"{path}: the file is empty: it holds no rating")


def read_blocks(
    path: Path, block_bytes: int = BLOCK_BYTES, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Block]:
    """Yield blocks of whole lines of a plain or gzip file, less byte-order mark and ``\\r`` of line ends."""
    rest, line = b"", 1
    with _open_bytes(path) as stream:
        while True:
            chunk = _read_chunk(path, stream, block_bytes, line)
            data = rest + chunk
            if line == 1 and data.startswith(_BOM):
                data = data[len(_BOM) :]
            end = data.rfind(b"\n") + 1 if chunk else len(data)
            data, rest = data[:end], data[end:]
            if len(rest) > max_line_bytes:
                line += data.count(b"\n")
                raise UserError(
                    f"{path}, line {line}: longer than {max_line_bytes} bytes; is this a text file?"
                )
            if data:
                yield Block(_unix_line_ends(data), line)
                line += data.count(b"\n")
            if not chunk:
                return


@dataclass(frozen=True)
class Layout:
    """A file's roles, its header line (or None), whether it begins with a byte-order mark, and its first line that is
    not blank (1-based)."""

    roles: Roles
    header: str | None
    has_bom: bool
    first_line: int


def layout_of(path: Path, layout: ReaderFormat) -> Layout:
    """What line 1 says about the file; UserError if it is empty or does not fit ``layout``."""
    block = next(_without_blank_start(read_blocks(path, block_bytes=MAX_LINE_BYTES)), None)
    if block is None:
        raise UserError(f"{path}: the file is empty: it holds no rating")
    body, roles = _take_header(path, block, layout)
    header = None if body.first_line == block.first_line else _first_line(path, block)
    with _open_bytes(path) as stream:
        return Layout(roles, header, stream.read(len(_BOM)) == _BOM, block.first_line)


def first_bytes(path: Path, count: int = 1 << 16) -> tuple[bytes, bool]:
    """The first bytes of the text, and whether the file is gzip."""
    with _open_bytes(path) as stream:
        return _read_chunk(path, stream, count, 1), isinstance(stream, gzip.GzipFile)


@dataclass(frozen=True)
class FirstLines:
    """Lines that are not blank; the first is line ``number`` of its file."""

    lines: list[str]
    number: int


def first_lines(path: Path, count: int) -> FirstLines:
    """Up to ``count`` lines as far as they are text; UserError if the first is not, or there is none."""
    block = next(_without_blank_start(read_blocks(path, block_bytes=MAX_LINE_BYTES)), None)
    if block is None:
        raise UserError(f"{path}: the file is empty: it holds no rating")
    lines = [_first_line(path, block)]
    for line in block.data.split(b"\n", count)[1:count]:
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            break
    return FirstLines([line for line in lines if line.strip(" \t")], block.first_line)


def first_delimiter(line: str) -> str | None:
    """The likeliest delimiter that the line holds, None for whitespace."""
    return next((delimiter for delimiter in ("::", "\t", ",", ";", "|") if delimiter in line), None)


def _open_bytes(path: Path) -> io.BufferedIOBase:
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        return gzip.GzipFile(path) if zipped else path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_chunk(path: Path, stream: io.BufferedIOBase, size: int, line: int) -> bytes:
    """``size`` bytes, fewer at the end; UserError with the last whole line where ``line`` is the next."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := stream.read1(min(size, _READ_BYTES))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        last = line - 1 + b"".join(parts).count(b"\n")
        raise UserError(
            f"{path}: gzip data truncated or damaged after line {last}; fetch the file again"
        ) from error
    except OSError as error:
        last = line - 1 + b"".join(parts).count(b"\n")
        raise UserError(f"{path}: cannot be read after line {last}: {error.strerror or error}") from error


def _unix_line_ends(data: bytes) -> bytes:
    if b"\r" not in data:
        return data
    data = data.replace(b"\r\n", b"\n")
    return data[:-1] if data.endswith(b"\r") else data


def _without_blank_start(blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks from the first line on that is not blank."""
    started = False
    for block in blocks:
        trimmed = block if started else _skip_blank_lines(block)
        started = started or bool(trimmed.data)
        if started:
            yield trimmed


def _skip_blank_lines(block: Block) -> Block:
    blank = cast("re.Match[bytes]", re.match(rb"(?:[ \t]*\n)*", block.data)).end()
    data = block.data[blank:]
    if not data.strip(b" \t"):
        data = b""
    return Block(data, block.first_line + block.data.count(b"\n", 0, blank))


def _first_line(path: Path, block: Block) -> str:
    try:
        return block.data.split(b"\n", 1)[0].decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {block.first_line}: not UTF-8 text; convert the file to UTF-8"
        ) from error


def _take_header(path: Path, block: Block, layout: ReaderFormat) -> tuple[Block, Roles]:
    """The block behind the header (if there is one) and the role of every column."""
    line = _first_line(path, block)
    fields = split_line(line, layout.delimiter)
    if layout.columns is None and layout.has_header is False:
        raise UserError(f"{path}: it has no header, so --columns must say what its columns are")
    roles = roles_by_name(path, fields) if layout.columns is None else check_roles(path, layout.columns)
    where = f"{path}, line {block.first_line}"
    if len(fields) != len(roles):
        hint = _delimiter_hint(line, layout.delimiter)
        raise UserError(f"{where}: {len(fields)} fields where {len(roles)} columns are expected{hint}")
    if layout.names is not None:
        roles = roles_like_first(where, fields, layout)
    elif layout.columns is not None and not _has_header(where, line, fields, layout):
        return block, roles
    _, _, body = block.data.partition(b"\n")
    return Block(body, block.first_line + 1), roles


def _has_header(where: str, line: str, fields: list[str], layout: ReaderFormat) -> bool:
    """Whether the line is a header of columns whose places are given; UserError if it says other places."""
    roles = layout.columns or ()
    if layout.has_header is None:
        if not looks_like_header(fields, roles):
            return False
        check_places(where, fields, roles)
        say_header(where, line, fields)
        return True
    if layout.has_header:
        check_header(where, fields, roles)
    return layout.has_header


def _delimiter_hint(line: str, delimiter: str | None) -> str:
    guess = first_delimiter(line)
    if guess == delimiter:
        return "; a column is missing or --columns is wrong"
    shown = "whitespace" if guess is None else repr(guess)
    return f"; the delimiter looks like {shown}, not {'whitespace' if delimiter is None else repr(delimiter)}"


def parse_fast(block: Block, delimiter: str | None, roles: Roles) -> pa.Table | None:
    """The block's rows by polars, or None where the strict parser has to look."""
    data = block.data
    if not data:
        return None
    plain = _single_separator(data, delimiter)
    if plain is None:
        return None
    data, separator = plain
    schema = {role or f"skip{i}": _POLARS_TYPES.get(role or "", pl.String) for i, role in enumerate(roles)}
    try:
        frame = pl.read_csv(
            io.BytesIO(data),
            has_header=False,
            separator=separator,
            quote_char=None,
            schema=schema,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError:
        return None
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    frame = frame.select([role for role in ROLES if role in roles])
    if frame.height != lines or not _is_clean(frame):
        return None
    return _to_arrow(frame)


def _single_separator(data: bytes, delimiter: str | None) -> tuple[bytes, str] | None:
    """The data with one byte between fields, and that byte; None where the strict parser must split it."""
    if b"\r" in data or b"\0" in data:
        return None
    if delimiter is None:
        data = data.replace(b"\t", b" ")
        uneven = b"  " in data or b"\n " in data or b" \n" in data
        if uneven or data.startswith(b" ") or data.endswith(b" "):
            return None
        return data, " "
    if len(delimiter) == 1 and delimiter.isascii():
        return None if b'"' in data else (data, delimiter)
    if _UNIT_SEPARATOR.encode() in data:
        return None
    return data.replace(delimiter.encode(), _UNIT_SEPARATOR.encode()), _UNIT_SEPARATOR


def _is_clean(frame: pl.DataFrame) -> bool:
    if sum(frame.null_count().row(0)):
        return False
    if "rating" in frame.columns and not frame["rating"].is_finite().all():
        return False
    if "timestamp" in frame.columns and frame.height:
        times = frame["timestamp"]
        return cast(int, times.min()) >= 0 and cast(int, times.max()) <= MAX_TIMESTAMP
    return True


def _to_arrow(frame: pl.DataFrame) -> pa.Table:
    types = {
        "user": pa.large_string(),
        "item": pa.large_string(),
        "rating": pa.float32(),
        "timestamp": pa.int64(),
    }
    return frame.to_arrow().cast(pa.schema([(name, types[name]) for name in frame.columns]))
