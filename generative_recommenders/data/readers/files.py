"""Raw files: what kind each is by its content, the data files of a folder, and the plain bytes of packed ones."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from generative_recommenders.errors import UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES)
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MOST_UNPACKED = 100
"""A file that unpacks to more than so many times its own size, and is not small, holds no events."""
READ_FAULTS = (EOFError, OSError, zlib.error, gzip.BadGzipFile, pa.ArrowException)
"""Errors raised while a damaged or unreadable file is read."""


def data_suffix(path: Path) -> str | None:
    """The suffix that says what a file holds, without that of its compression; None for a file that is no data."""
    name = _unpacked_name(path)
    suffix = Path(name).suffix
    return suffix if suffix in _SUFFIXES and not name.startswith((".", "_")) else None


class EmptyFileError(UserError):
    """A file without an event: a fault by itself, and passed over among the parts of a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: the file is empty: it holds no event")


def _unpacked_name(path: Path) -> str:
    """The name in lower case, without the suffix of its compression."""
    return re.sub(r"\.(gz|zst|zstd)$", "", path.name.lower())


def data_files(folder: Path, files: list[Path]) -> list[Path]:
    """The parts of a data set among the files of a folder, in the order of their names.

    Only files of one kind are read. A text file such as README.txt beside a ratings.csv is another kind and left out;
    which of two kinds is meant when neither is ``.txt`` is not guessed. UserError: no data file, or several kinds.
    """
    by_suffix: dict[str, list[Path]] = {}
    for path in sorted(files):
        suffix = data_suffix(path)
        if suffix is not None:
            by_suffix.setdefault(suffix, []).append(path)
    kinds = [each for each in by_suffix if each != ".txt"] or list(by_suffix)
    if not kinds:
        raise UserError(f"{folder}: holds no file that ends in {', '.join(_SUFFIXES)} (or these and .gz or .zst)")
    if len(kinds) > 1:
        names = ", ".join(by_suffix[each][0].name for each in kinds)
        raise UserError(f"{folder}: holds data files of several kinds ({names}); give one file with --raw_path")
    unpacked: dict[str, Path] = {}
    for path in by_suffix[kinds[0]]:
        if path.name != path.name.encode(errors="replace").decode():
            raise UserError(f"{path}: the name is not UTF-8 text; rename the file")
        other = unpacked.setdefault(_unpacked_name(path), path)
        if other is not path:
            raise UserError(f"{folder}: {other.name} and {path.name} hold the same events; remove one of them")
    return by_suffix[kinds[0]]


def kind_of(path: Path) -> str:
    """ "parquet", "arrow" (IPC file or stream), "json" (a JSON object a line) or "text" (delimited), by the first
    bytes."""
    try:
        with open_unpacked(path) as stream:
            start = stream.read(1 << 12)
    except READ_FAULTS as error:
        raise UserError(f"{path}: damaged or cut short at its beginning; fetch the file again ({error})") from error
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):  # the last is how an Arrow stream begins
        kind = "parquet" if start.startswith(b"PAR1") else "arrow"
        if is_packed(path):
            raise UserError(f"{path}: {kind.capitalize()} that is packed once more: unpack it first")
        return kind
    for mark, other in ((b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if start.startswith(mark):
            raise UserError(f"{path}: packed by {other}; unpack it, or pack it by gzip or zstd, which are read")
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"\[\s*\{", start):
        raise UserError(f"{path}: a JSON array; write one object a line (JSON lines)")
    return "json" if start.startswith(b"{") else "text"


def is_packed(path: Path) -> bool:
    """Whether a file is gzip or zstd by its first bytes."""
    with open_raw(path) as stream:
        return stream.read(4).startswith((_GZIP, _ZSTD))


def unpacked_limit(path: Path, small: int) -> int:
    """The bytes that a packed file of events may unpack to, of which ``small`` are allowed to any."""
    return max(small, MOST_UNPACKED * path.stat().st_size)


def open_raw(path: Path) -> BinaryIO:
    """The file as it is; UserError if it cannot be read, or is no regular file (a pipe would block)."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_unpacked(path: Path) -> BinaryIO:
    """The bytes of a plain, gzip or zstd file."""
    stream = open_raw(path)
    start = stream.read(4)
    stream.seek(0)
    if start.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if start.startswith(_ZSTD):
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(stream), "zstd"))
    return stream
