"""Delimited text: blocks of whole lines, their fields as columns of text, and the line of the first fault."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from generative_recommenders.data.readers.files import (
    READ_FAULTS,
    EmptyFileError,
    is_packed,
    open_unpacked,
    unpacked_limit,
)
from generative_recommenders.data.readers.values import Rows
from generative_recommenders.errors import UserError

BLOCK_BYTES, BLOCK_LINES = 16 << 20, 1 << 19
"""Bounds on a block: a line may be short, and each of its fields takes some ten bytes more when it is read."""
MAX_LINE_BYTES = 1 << 20
SMALL_BYTES = 256 << 20
"""Limit of the unpacked size of a packed file; it is read a block at a time."""
SAMPLE_LINES = 100
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
_UNIT_SEPARATOR = b"\x1f"
MAX_FIELD_BYTES = 1 << 28
"""Of a whole sequence in the exchange format; other lines are shorter."""
csv.field_size_limit(MAX_FIELD_BYTES)  # of Python's csv, which names the line of a fault: 128 KiB by default
DELIMITERS = ("::", "\t", ",", ";", "|", None)
"""Tried where none is given; None is runs of spaces and tabs."""


@dataclass(frozen=True)
class Dialect:
    """Division of lines into fields: delimiter (None: runs of spaces and tabs), and whether ``"`` quotes a field (RFC
    4180)."""

    delimiter: str | None
    quoting: bool

    def __str__(self) -> str:
        return "spaces" if self.delimiter is None else repr(self.delimiter)

    def split(self, line: str) -> list[str]:
        """The fields of one line."""
        if self.delimiter is None:
            return re.split(r"[ \t]+", line.strip(" \t"))
        if not self.quoting:
            return line.split(self.delimiter)
        try:
            return next(csv.reader([line], delimiter=self.delimiter, strict=True), [])
        except csv.Error:
            return line.split(self.delimiter)


@dataclass(frozen=True)
class Block:
    """Whole lines with ``\\n`` line ends; the first is line ``first_line`` of its file, counted from 1."""

    data: bytes
    first_line: int

    def after_line(self, number: int) -> Block:
        """The lines after line ``number`` of the file."""
        count = number - self.first_line + 1
        if count <= 0:
            return self
        parts = self.data.split(b"\n", count)
        return Block(parts[count] if len(parts) > count else b"", number + 1)


def read_blocks(
    path: Path, delimiter: str | None = None, block_bytes: int | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Block]:
    """Blocks of whole lines of a plain or packed file, without byte-order mark and ``\\r`` of line ends.

    delimiter: of fields that ``"`` may quote, where a line end is part of the field and no block ends; None where
    quotes are text. block_bytes: `BLOCK_BYTES` by default. UserError: damaged files, lines longer than a text file has.
    """
    rest, line = b"", 1
    unpacked, most = 0, unpacked_limit(path, SMALL_BYTES) if is_packed(path) else float("inf")
    with open_unpacked(path) as stream:
        while True:
            chunk = _read_chunk(path, stream, block_bytes or BLOCK_BYTES, line)
            unpacked += len(chunk)
            if unpacked > most:
                raise UserError(f"{path}: it unpacks to more than {most} bytes; is this a file of events?")
            data = rest + chunk
            if line == 1:
                data = data.removeprefix(_BOM)
            end = len(data) if not chunk else data.rfind(b"\n") + 1
            # An open quote at the end of the lines: the rows end before it.
            if delimiter and (data.count(b'"', 0, end) % 2 or not _is_well_quoted(data[:end], delimiter)):
                ends = _row_ends(data[:end], delimiter)
                whole = int(ends[-1]) + 1 if len(ends) else 0
                if not chunk and b"\n" in data[whole:]:
                    at = line + data.count(b"\n", 0, whole)
                    raise UserError(f"{path}, line {at}: a quote is not closed; --quoting=none reads quotes as text")
                end = whole if chunk else end
            data, rest = data[:end], data[end:]
            if len(rest) > max_line_bytes:
                at = line + data.count(b"\n")
                what = f"longer than {max_line_bytes} bytes"
                if b"\n" in rest.rstrip(b"\n"):
                    what = f"a quote is not closed within {max_line_bytes} bytes; --quoting=none reads quotes as text"
                raise UserError(f"{path}, line {at}: {what}; is this a text file of events?")
            cuts = [0, len(data)]
            if data.count(b"\n") > BLOCK_LINES:
                cuts[1:1] = (_row_ends(data, delimiter)[BLOCK_LINES - 1 : -1 : BLOCK_LINES] + 1).tolist()
            for part in (data[first:last] for first, last in pairwise(cuts) if last > first):
                yield Block(part.replace(b"\r\n", b"\n").removesuffix(b"\r"), line)
                line += part.count(b"\n")
            if not chunk:
                return


def _is_well_quoted(data: bytes, delimiter: str) -> bool:
    """Whether every quote opens or closes a field, or is one of two inside it (RFC 4180)."""
    read = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(read == ord('"'))
    beside = np.zeros(256, bool)  # what lies before an opening quote and after a closing one
    beside[list(b'\r\n"' + delimiter.encode())] = True
    opening, closing = quotes[::2], quotes[1::2]
    opens = (opening == 0) | beside[read[opening - 1]]
    closes = (closing == len(read) - 1) | beside[read[np.minimum(closing + 1, len(read) - 1)]]
    return bool(opens.all() and closes.all())


def _row_ends(data: bytes, delimiter: str | None) -> np.ndarray:
    """Places of the line ends that no quotes enclose; ``data`` begins with a row."""
    read = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(read == ord("\n"))
    if delimiter is None or b'"' not in data:
        return ends
    if not _is_well_quoted(data, delimiter):
        # Marks of inches and the like, inside fields that no quotes enclose, are text: row by row.
        text = io.StringIO(data.decode(errors="replace") + "x", newline="\n")  # so that the last row has no line end
        reader = csv.reader(text, delimiter=delimiter)
        with suppress(csv.Error):  # the fault is named when the block is parsed
            return ends[np.array([reader.line_num for _ in reader][:-1], np.int64) - 1]
    return ends[np.cumsum(read == ord('"'), dtype=np.uint8)[ends] & 1 == 0]


def _read_chunk(path: Path, stream, size: int, line: int) -> bytes:
    """``size`` bytes, fewer at the end; UserError with the last whole line where ``line`` is the next."""
    parts: list[bytes] = []
    try:
        read = getattr(stream, "read1", stream.read)  # which gives what there is before a fault
        while size > 0 and (part := read(min(size, _READ_BYTES))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
    except READ_FAULTS as error:
        last = line - 1 + b"".join(parts).count(b"\n")
        reason = getattr(error, "strerror", None) or "packed data are damaged or cut short"
        raise UserError(f"{path}: cannot be read after line {last}: {reason}; fetch the file again") from error


def first_lines(path: Path) -> tuple[list[str], int]:
    """Some first lines that are not blank, and the number of the first one; UserError if there is none, or it is no
    text."""
    lines: list[str] = []
    first = 1
    for block in read_blocks(path, block_bytes=MAX_LINE_BYTES):
        if not block.data.strip(b" \t\n"):  # a million blank lines at once
            continue
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if len(lines) == SAMPLE_LINES:
                break
            if not line.strip(b" \t"):
                continue
            if b"\r" in line:
                raise UserError(
                    f"{path}, line {number}: a carriage return inside the line; end lines with \\n or \\r\\n"
                )
            if not lines:
                first = number
            try:
                lines.append(line.decode())
            except UnicodeDecodeError as error:
                if len(lines) < 2:  # a header alone is no event yet
                    raise UserError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8") from error
                break
        if len(lines) > 1:  # a header and an event
            break
    if not lines:
        raise EmptyFileError(path)
    return lines, first


def parse(path: Path, block: Block, dialect: Dialect, num_fields: int, wanted: list[int]) -> pa.Table:
    """The ``wanted`` fields (places from 0) of every line that is not blank, as columns "0", "1", ... of large_string.

    UserError: the line that has another number of fields, is no UTF-8 or has a NUL byte.
    """
    data, delimiter = block.data, dialect.delimiter
    faults = {b"\0": "a NUL byte; is this a text file?", b"\r": "a carriage return inside the line"}
    separator = delimiter or " "
    if len(separator) > 1 or not separator.isascii():  # pyarrow divides by single bytes alone
        faults[_UNIT_SEPARATOR] = "a control character (0x1f) inside the line"
        separator = _UNIT_SEPARATOR.decode()
    for mark, fault in faults.items():
        if (at := data.find(mark)) >= 0:
            raise UserError(f"{path}, line {_line_at(block, at)}: {fault}")
    if delimiter is None:
        # One blank between fields and none at the ends of lines; each step only where it acts, for speed.
        data = data.replace(b"\t", b" ")
        if b"  " in data:
            data = re.sub(rb" +", b" ", data)
        if b"\n " in data or b" \n" in data or data[:1] == b" " or data[-1:] == b" ":
            data = re.sub(rb"(?m)^ | $", b"", data)
    elif separator != delimiter:
        data = data.replace(delimiter.encode(), _UNIT_SEPARATOR)
    names = [str(place) for place in range(num_fields)]
    columns = [str(place) for place in wanted]
    for threads in (True, False):  # with threads pyarrow does not know the number of the row at fault
        try:
            return pyarrow.csv.read_csv(
                pa.py_buffer(data),
                pyarrow.csv.ReadOptions(column_names=names, use_threads=threads, block_size=max(len(data), 1)),
                pyarrow.csv.ParseOptions(
                    delimiter=separator,
                    quote_char='"' if dialect.quoting else False,
                    newlines_in_values=dialect.quoting,
                ),
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.large_string()), include_columns=columns,
                    strings_can_be_null=False, null_values=[], check_utf8=True,
                ),
            )  # fmt: skip
        except pa.ArrowInvalid as error:
            fault = str(error)
    raise UserError(_fault(path, Block(data, block.first_line), dialect, separator, num_fields, fault))


def _line_at(block: Block, position: int) -> int:
    return block.first_line + block.data.count(b"\n", 0, position)


def _fault(path: Path, block: Block, dialect: Dialect, separator: str, num_fields: int, fault: str) -> str:
    """The fault of a block that cannot be parsed, with the line: looked for one line at a time, as it is told once."""
    try:
        block.data.decode()
        for line, fields in _rows(block, dialect, separator, strict=True):
            if len(fields) != num_fields:
                shown = "" if dialect.quoting else f": {separator.join(fields)[:100]!r}"
                return f"{path}, line {line}: {len(fields)} fields where {num_fields} are expected{shown}"
    except UnicodeDecodeError as error:
        return f"{path}, line {_line_at(block, error.start)}: not UTF-8 text; convert the file to UTF-8"
    except csv.Error as error:
        return f"{path}, {error}; --quoting=none reads quotes as text"
    return f"{path}, near line {block.first_line}: {fault[:200]}"


def _rows(block: Block, dialect: Dialect, separator: str, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the line that each begins on. csv.Error: a line whose quotes are wrong where
    ``strict``."""
    text = block.data.decode(errors="replace")
    if not dialect.quoting:
        lines = enumerate(text.split("\n"), block.first_line)
        blanks = " \t" if dialect.delimiter is None else ""  # which are fields where they do not divide them
        yield from ((number, line.split(separator)) for number, line in lines if line.strip(blanks))
        return
    reader, begin = csv.reader(io.StringIO(text), delimiter=separator, strict=strict), block.first_line
    try:
        for fields in reader:
            if fields:
                yield begin, fields
            begin = block.first_line + reader.line_num
    except csv.Error as error:
        raise csv.Error(f"line {begin}: {error}") from error


def rows_of(path: Path, block: Block, dialect: Dialect) -> Rows:
    """The rows of a parsed block, blank lines not counted, which know the lines that they begin on."""

    def line_of(row: int) -> str:
        rows = _rows(block, dialect, dialect.delimiter or " ")
        line, _ = next(islice(rows, row, None), (block.first_line, []))
        return f"line {line}"

    return Rows(str(path), line_of)
