"""Downloads that survive bad mirrors and cut connections, and that are only believed by their checksum."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from generative_recommenders.features import UserError

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 10
"""Tries that a mirror gets, as long as each of them brings new bytes."""

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


def fetch(
    remote: RemoteFile, folder: Path, *, progress: bool = True, timeout: float = TIMEOUT_SECONDS
) -> Path:
    """Path of the file in `folder`, downloaded unless a file of the right checksum is there already.

    A partial download is kept as ``NAME.part`` and taken up again with a Range request; by another mirror or
    a later call only if there is a checksum to catch a mixture.

    Raises:
        UserError: no mirror delivers the file; the line says what to download by hand and where to put it.
    """
    target = folder / remote.file_name
    if target.exists() and (remote.checksum is None or remote.describes(target)):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{remote.file_name}.part"
    if remote.checksum is None:
        part.unlink(missing_ok=True)
    hosts_of: dict[str, dict[str, None]] = {}
    for url in remote.urls:
        try:
            _from_mirror(remote, url, part, progress, timeout)
        except _BrokenTransferError as fault:
            hosts_of.setdefault(str(fault), {})[urlsplit(url).netloc] = None
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
    """Fill `part` from one mirror; if a resumed download has the wrong checksum, once more from zero."""
    resumed = part.exists() and part.stat().st_size > 0
    _transfer_with_retries(url, part, progress, timeout)
    if remote.checksum is None or remote.describes(part):
        return
    part.unlink()
    if resumed:
        _transfer_with_retries(url, part, progress, timeout)
        if remote.describes(part):
            return
        part.unlink()
    raise _BrokenTransferError(f"its {remote.algorithm} is not the published {remote.checksum}")


def _transfer_with_retries(url: str, part: Path, progress: bool, timeout: float) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _transfer(url, part, progress, timeout)
        except _NETWORK_FAULTS as fault:
            gained = part.exists() and part.stat().st_size > before
            if attempt == ATTEMPTS or not gained:
                raise _BrokenTransferError(_reason(fault)) from None
    return None


def _transfer(url: str, part: Path, progress: bool, timeout: float) -> None:
    """One request, for the bytes that `part` lacks; a server that knows no ranges sends all of them."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "generative-recommenders", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as fault:
        if fault.code == 416 and have:
            return _after_the_end(fault, url, part, progress, timeout)
        raise
    with response:
        start = have if response.status == 206 and _range_start(response.headers) == have else 0
        if response.status == 206 and start != have:
            raise http.client.HTTPException("answered another range than was asked for")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        with part.open("ab" if start else "wb") as sink:
            _copy(response, sink, start, total, part.stem if progress else None)
    return None


def _after_the_end(
    fault: urllib.error.HTTPError, url: str, part: Path, progress: bool, timeout: float
) -> None:
    """The server has nothing behind our last byte: the part is whole, or it belongs to another file."""
    total = (fault.headers.get("Content-Range") or "").rpartition("/")[2]
    if total == str(part.stat().st_size):
        return None
    part.unlink()
    return _transfer(url, part, progress, timeout)


def _copy(
    response: http.client.HTTPResponse, sink: BinaryIO, start: int, total: int | None, title: str | None
) -> None:
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
    return int(start) if start.isdigit() else None


def _reason(fault: BaseException) -> str:
    reason = getattr(fault, "reason", None) or str(fault) or type(fault).__name__
    return " ".join(str(reason).split())
