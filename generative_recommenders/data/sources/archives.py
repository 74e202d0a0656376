"""Unpacking of untrusted archives: below one folder, without links, within bounds of size."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from generative_recommenders.data.preparation.folder import remove_leftovers, scratch_owner
from generative_recommenders.errors import UserError

BLOCK_BYTES = 1 << 20
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_FOREIGN = re.compile(r"^[A-Za-z]:|[\\\0]")
_TAR_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
HEADER_LIMIT = 1 << 20  # bytes
MOST_BYTES, MOST_MEMBERS = 64 << 30, 100_000
"""Limit of the unpacked size of an archive."""
MOST_RATIO, FREE_BYTES = 200, 64 << 20
"""Of the unpacked to the packed size, looked at beyond so many bytes."""


class _Member(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_plain: bool
    open: Callable[[], Any]


def is_archive(path: Path) -> bool:
    """Whether the file is a zip or a tar (plain, gzip, bzip2 or xz), by content. A lone gzip file is not."""
    if not path.is_file():  # a pipe would keep the program waiting
        return False
    with path.open("rb") as source:
        if source.read(4) in {b"PK\x03\x04", b"PK\x05\x06"}:
            return True
    return _tar_opener(path) is not None


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Unpack the files whose base name is `wanted` into `folder` and return their paths, in archive order.

    Folders of the archive are not kept: a file lands at ``folder / base name``, and appears there only when
    all of the archive was found good. Every member is checked, wanted or not.

    Raises:
        UserError: not an archive, damaged, or unsafe (a path that is absolute, has ``..``, a drive or a
            backslash; a link or device; two wanted files of one name; more than the bounds allow).
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, ".unpacking-")
    names: list[str] = []
    temporary = folder / f".unpacking-{scratch_owner()}"
    temporary.mkdir()
    try:
        for member in _safe_members(archive):
            name = PurePosixPath(member.name).name
            if member.is_folder or not wanted(name):
                continue
            if name in names:
                raise UserError(
                    f"{archive}: holds two files named {name}; unpack it and name one of them with --raw_path"
                )
            names.append(name)
            # Neither module reads a member beyond its declared size, which is within bounds.
            with member.open() as source, (temporary / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, BLOCK_BYTES)
        for name in names:
            (temporary / name).replace(folder / name)
    except _BROKEN as fault:
        raise UserError(f"{archive}: damaged archive ({fault}); download it again") from None
    except RuntimeError as fault:  # what zipfile raises for encrypted members and unknown methods
        raise UserError(f"{archive}: {fault}") from None
    except OSError as fault:  # without a number: what gzip and bzip2 raise for damaged data
        what = f"cannot unpack it: {fault.strerror}" if fault.errno else f"damaged archive ({fault})"
        raise UserError(f"{archive}: {what}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name for name in names]


def _safe_members(archive: Path) -> Iterator[_Member]:
    """The members one after the other; UserError at the first that no archive of data has."""
    allowed = min(MOST_BYTES, max(FREE_BYTES, archive.stat().st_size * MOST_RATIO))
    declared = 0
    for number, member in enumerate(_members(archive), start=1):
        path = PurePosixPath(member.name)
        outside = path.is_absolute() or ".." in path.parts or _FOREIGN.search(member.name)
        is_top = member.is_folder and not path.parts  # "." or "./", which archives of a folder begin with
        if number > MOST_MEMBERS:
            raise UserError(f"{archive}: more than {MOST_MEMBERS} files in the archive")
        if outside or not (path.name or is_top):
            raise UserError(f"{archive}: member {member.name!r} would leave the folder; not unpacked")
        if not member.is_folder and not member.is_plain:
            raise UserError(f"{archive}: member {member.name!r} is a link or a device; not unpacked")
        if member.size < 0:  # tarfile believes it, and the sum would then allow any other member
            raise UserError(f"{archive}: damaged archive (member {path.name!r} of {member.size} bytes)")
        declared += member.size
        if declared > allowed:
            raise UserError(f"{archive}: unpacks to more than its size allows (a zip bomb?); not unpacked")
        yield member


def _members(archive: Path) -> Iterator[_Member]:
    opener = _tar_opener(archive)
    if opener is not None:
        with opener(archive, "rb") as plain, tarfile.open(fileobj=plain, mode="r:", tarinfo=_BoundedHeader) as tar:
            for info in tar:
                yield _Member(info.name, info.size, info.isdir(), info.isreg(), partial(tar.extractfile, info))
        return
    with zipfile.ZipFile(archive) as pack:
        for entry in pack.infolist():
            # Not a link or device; many zips record no kind at all.
            is_plain = stat.S_IFMT(entry.external_attr >> 16) in {0, stat.S_IFREG}
            # filename is what zipfile made of it: it ends at a zero byte, and backslashes may be gone.
            name, open_it = entry.orig_filename, partial(pack.open, entry)
            yield _Member(name, entry.file_size, entry.is_dir(), is_plain, open_it)


class _BoundedHeader(tarfile.TarInfo):
    """Refuses headers that hold more than any name does: tarfile would read them whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _TAR_HEADERS and header.size > HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _tar_opener(path: Path) -> Callable[..., Any] | None:
    """What unpacks the file to a tar, by the mark that POSIX tars carry; None where nothing does."""
    # tarfile.is_tarfile would read the first header whole, whatever size it claims.
    openers: tuple[Callable[..., Any], ...] = (open, gzip.open, bz2.open, lzma.open)
    for opener in openers:
        with suppress(OSError, EOFError, zlib.error, lzma.LZMAError), opener(path, "rb") as source:
            if source.read(512)[257:262] == b"ustar":
                return opener
    return None
