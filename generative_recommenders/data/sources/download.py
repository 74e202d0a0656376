"""Downloads over several mirrors, resumed after cut connections and verified by checksum."""

from __future__ import annotations

import glob
import gzip
import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from generative_recommenders.errors import UserError

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 10
"""Tries that a mirror gets, as long as each of them brings new bytes."""

_SECOND = ".new"
"""Ends the name of what is written beside a partial download."""
_NETWORK_FAULTS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)


@dataclass(frozen=True)
class RemoteFile:
    """A published file: where it can be had and how to know it.

    urls: mirrors in order of preference; the first is the one that people are pointed to.
    checksum: lower-case hexadecimal digest by `algorithm`, or None where none is published.
    """

    file_name: str
    urls: Sequence[str]
    checksum: str | None = None
    algorithm: Literal["md5", "sha256"] = "md5"

    def describes(self, path: Path) -> bool:
        """Whether the file at `path` is this one by its published checksum."""
        return self.checksum is not None and file_digest(path, self.algorithm) == self.checksum


class _BrokenTransferError(Exception):
    """This mirror did not deliver the file; another one, or another try, may."""


class _MisfitError(_BrokenTransferError):
    """The partial download does not become the file by what this mirror has."""


def fetch(
    remote: RemoteFile, folder: Path, *, progress: bool = True, timeout: float = TIMEOUT_SECONDS
) -> Path:
    """Path of the file in `folder`, downloaded unless a file of the right checksum is there already.

    A partial download is kept as ``NAME.part`` and taken up again with a Range request; by another mirror or
    a later call only if there is a checksum to catch a mixture. A mirror that has something else does not
    cost it.

    Raises:
        UserError: no mirror delivers the file; the line says what to download by hand and where to put it.
    """
    target = folder / remote.file_name
    if target.exists() and (remote.checksum is None or remote.describes(target)):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{remote.file_name}.part"
    for left in folder.glob(f"{glob.escape(part.name)}{_SECOND}*"):
        left.unlink()
    if remote.checksum is None:
        part.unlink(missing_ok=True)
    hosts_of: dict[str, dict[str, None]] = {}
    for url in remote.urls:
        try:
            _from_mirror(remote, url, part, progress, timeout)
        except _BrokenTransferError as fault:
            hosts_of.setdefault(str(fault), {})[_host(url)] = None
            if remote.checksum is None:
                part.unlink(missing_ok=True)
            continue
        except OSError as fault:
            raise UserError(f"cannot write {part}: {fault.strerror or fault}") from None
        part.replace(target)
        return target
    faults = "; ".join(f"{', '.join(hosts)}: {fault}" for fault, hosts in hosts_of.items())
    there = f", and {target} is not the published file" if target.exists() else ""
    raise UserError(
        f"cannot download {remote.file_name} ({faults}){there}: download {remote.urls[0]} by hand "
        f"and put it at {target}, or pass --raw_path=FILE"
    )


def file_digest(path: Path, algorithm: str = "md5", decompress: bool = False) -> str:
    """Hexadecimal digest of a file, or of what a gzip file holds (`decompress`)."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with gzip.open(path) if decompress else path.open("rb") as source:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _from_mirror(remote: RemoteFile, url: str, part: Path, progress: bool, timeout: float) -> None:
    """Make `part` the file from one mirror; if the bytes held do not fit what it has, once more from zero.

    The bytes held stay unless the mirror delivers the file, or more bytes than they are before it breaks off.
    """
    held = _size(part)
    try:
        _transfer_with_retries(remote, url, part, progress, timeout)
    except _MisfitError:
        if not held:
            part.unlink()
            raise
        os.truncate(part, held)
        with _beside(part) as anew:
            _from_mirror(remote, url, anew, progress, timeout)
            anew.replace(part)


def _transfer_with_retries(remote: RemoteFile, url: str, part: Path, progress: bool, timeout: float) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(part)
        try:
            return _transfer(remote, url, part, progress, timeout)
        except _NETWORK_FAULTS as fault:
            if attempt == ATTEMPTS or _size(part) <= before:
                raise _BrokenTransferError(_reason(fault)) from None
    return None


def _transfer(remote: RemoteFile, url: str, part: Path, progress: bool, timeout: float) -> None:
    """One request, for the bytes that `part` lacks; a server that knows no ranges sends all of them."""
    have = _size(part)
    try:
        response = _open(url, have, timeout)
    except urllib.error.HTTPError as fault:
        if fault.code == 416 and have:
            return _after_the_end(remote, fault, part)
        raise
    title = remote.file_name if progress else None
    with response:
        if response.status == 206 and _range_start(response.headers) != have:
            raise http.client.HTTPException("answered another range than was asked for")
        if have and response.status != 206:
            return _take_all(remote, response, part, title)
        with part.open("ab") as sink:
            _copy(response, sink, have, title)
    return _check(remote, part)


def _open(url: str, start: int, timeout: float) -> http.client.HTTPResponse:
    headers = {"User-Agent": "generative-recommenders", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except ValueError as fault:
        raise _BrokenTransferError(f"no valid address of a mirror or proxy: {_reason(fault)}") from None


def _take_all(remote: RemoteFile, response: http.client.HTTPResponse, part: Path, title: str | None) -> None:
    """An answer with all bytes, though some are held: it may as well be a page that says something else."""
    with _beside(part) as new:
        with new.open("wb") as sink:
            _copy(response, sink, 0, title)
        if remote.checksum is None and _size(new) <= _size(part):
            raise _BrokenTransferError("answered less than it had sent before")
        if remote.checksum is not None and not remote.describes(new):
            new.unlink()
            raise _BrokenTransferError(_wrong(remote))
        new.replace(part)


@contextmanager
def _beside(part: Path) -> Iterator[Path]:
    """Name of a second file; what is there at the end replaces `part` if it is longer and else vanishes."""
    new = part.with_name(part.name + _SECOND)
    try:
        yield new
    finally:
        if _size(new) > _size(part):
            new.replace(part)
        new.unlink(missing_ok=True)


def _after_the_end(remote: RemoteFile, fault: urllib.error.HTTPError, part: Path) -> None:
    """The server has nothing behind our last byte: the part is whole, or it belongs to another file."""
    total = (fault.headers.get("Content-Range") or "").rpartition("/")[2]
    if total != str(_size(part)):
        raise _MisfitError(f"its file ends before the {_size(part)} bytes of {part.name}")
    _check(remote, part)


def _check(remote: RemoteFile, part: Path) -> None:
    if remote.checksum is not None and not remote.describes(part):
        raise _MisfitError(_wrong(remote))


def _wrong(remote: RemoteFile) -> str:
    return f"its {remote.algorithm} is not the published {remote.checksum}"


def _copy(response: http.client.HTTPResponse, sink: BinaryIO, start: int, title: str | None) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length and length.isdecimal() else None
    received = start
    with tqdm(
        total=total, initial=start, desc=title, unit="B", unit_scale=True, disable=title is None
    ) as bar:
        while block := response.read(BLOCK_BYTES):
            sink.write(block)
            received += len(block)
            bar.update(len(block))
    if total is not None and received < total:
        raise http.client.HTTPException(f"connection cut after {received} of {total} bytes")


def _range_start(headers: http.client.HTTPMessage) -> int | None:
    start = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdecimal() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc or url
    except ValueError:
        return url


def _reason(fault: BaseException) -> str:
    reason = getattr(fault, "reason", None) or str(fault) or type(fault).__name__
    return " ".join(str(reason).split())
