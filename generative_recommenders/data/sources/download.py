"""Downloads over several mirrors, verified by checksum."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from generative_recommenders.errors import UserError

Digest = Literal["md5", "sha256"]
BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
_HEADERS = {"User-Agent": "generative-recommenders", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class RemoteFile:
    """A published file: where it can be had and how to know it.

    urls: mirrors in order of preference; the first is the one that people are pointed to.
    checksum: lower-case hexadecimal digest by `algorithm`.
    """

    file_name: str
    urls: Sequence[str]
    checksum: str
    algorithm: Digest = "md5"

    def describes(self, path: Path) -> bool:
        """Whether the file at `path` is this one by its published checksum."""
        return file_digest(path, self.algorithm) == self.checksum


class _WrongFileError(Exception):
    """A mirror delivered something else than the published file."""


def fetch(remote: RemoteFile, folder: Path, *, progress: bool = True) -> Path:
    """Path of the file in `folder`, downloaded unless a file of the right checksum is there already.

    Mirrors are tried in turn. Bytes go to ``NAME.part``, which takes the file's place only when it is whole and of the
    right checksum, so a bad mirror never costs a file that is there.

    Raises:
        UserError: no mirror delivers the file; the line says what to download by hand and where to put it.
    """
    import pooch  # slow to import, and only a download needs these
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    target, part = folder / remote.file_name, folder / f"{remote.file_name}.part"
    if target.exists() and remote.describes(target):
        return target
    hosts_of: dict[str, dict[str, None]] = {}
    for url in remote.urls:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # pooch replaces the total by the answer's length; without one here it could not ask whether there is a bar.
            bar = tqdm(total=1, desc=remote.file_name, unit="B", unit_scale=True, disable=not progress)
            with bar, part.open("wb") as sink:
                pooch.HTTPDownloader(bar, BLOCK_BYTES, headers=_HEADERS, timeout=TIMEOUT_SECONDS)(url, sink, None)
            if not remote.describes(part):
                raise _WrongFileError(f"its {remote.algorithm} is not the published {remote.checksum}")
            return part.replace(target)
        # A malformed address of a mirror or proxy is a ValueError or urllib3's own error.
        except (RequestException, HTTPError, ValueError, _WrongFileError) as fault:
            host = ""
            with suppress(ValueError):
                host = urlsplit(url).netloc
            hosts_of.setdefault(_reason(fault), {})[host or url] = None
        except OSError as fault:
            raise UserError(f"cannot write {part}: {fault.strerror or fault}") from None
        finally:
            if part.is_file():
                part.unlink()
    faults = "; ".join(f"{', '.join(hosts)}: {fault}" for fault, hosts in hosts_of.items())
    there = f", and {target} is not the published file" if target.exists() else ""
    raise UserError(
        f"cannot download {remote.file_name} ({faults}){there}: download {remote.urls[0]} by hand "
        f"and put it at {target}, or pass --raw_path=FILE"
    )


def file_digest(path: Path, algorithm: str = "md5", decompress: bool = False) -> str:
    """Hexadecimal digest of a file, or of what a gzip file holds (`decompress`)."""
    with gzip.open(path) if decompress else path.open("rb") as source:
        return hashlib.file_digest(source, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _reason(fault: BaseException) -> str:
    """The innermost cause in one line: those around it repeat host and address."""
    while fault.__context__ is not None:
        fault = fault.__context__
    return " ".join(str(getattr(fault, "strerror", None) or fault or type(fault).__name__).split())
