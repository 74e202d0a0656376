"""Data sources by name: where the ratings come from, how they are laid out, and what is known about them.

A data source is a function ``Request -> RawRatings``, registered by the name that ``--dataset`` takes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from generative_recommenders.config.registry import DATA_SOURCES, register_data_source
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.readers.files import data_files, data_suffix
from generative_recommenders.data.sources import movielens
from generative_recommenders.data.sources.archives import extract, is_archive
from generative_recommenders.data.sources.download import Digest, RemoteFile, fetch, file_digest
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings, write_synthetic_books
from generative_recommenders.errors import UserError

_GROUPLENS = (
    "https://files.grouplens.org/datasets/movielens/",
    "https://web.archive.org/web/2024id_/https://files.grouplens.org/datasets/movielens/",
)
# Plain http is for what has a published sha256 alone: an MD5 proves nothing against somebody on the way.
_SNAP = (
    "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
    "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
    "https://web.archive.org/web/2020id_/http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
)


@dataclass(frozen=True)
class Request:
    """Arguments of `resolve`, and the `folder` that keeps the raw files of this data set."""

    name: str
    folder: Path
    raw_path: Path | None
    options: ReadOptions
    synthetic: SyntheticBooksSettings
    progress: bool


@dataclass(frozen=True)
class PublishedRatings:
    """Published data set.

    archive: what is downloaded. ratings: name of the ratings file, and its size in bytes as published.
    items, users: side files of `movielens.SIDE_FILES`, in order of preference.
    num_items, num_users: counts after preparation of the published data with their own filter.
    """

    archive: RemoteFile
    ratings: str
    ratings_bytes: int | None
    options: ReadOptions
    num_items: int
    num_users: int
    filter: str = "none"
    items: tuple[str, ...] = ()
    users: tuple[str, ...] = ()


def _remote(mirrors: tuple[str, ...], name: str, checksum: str, algorithm: Digest = "md5") -> RemoteFile:
    return RemoteFile(name, [mirror + name for mirror in mirrors], checksum, algorithm)


def _without_header(delimiter: str) -> ReadOptions:
    """Text as published: no header and no quotes."""
    return ReadOptions("user,item,rating,timestamp", delimiter, header=False, quoting="none", time_unit="s")


PUBLISHED = {
    "amzn-books": PublishedRatings(
        archive=_remote(
            _SNAP, "ratings_Books.csv", "87d923ddac2aacf40c1d0e0e056dbf4bf69c9c7d41852c6b434e781e759c0707", "sha256"
        ),
        ratings="ratings_Books.csv",
        ratings_bytes=None,
        options=_without_header(","),
        num_items=695_762,
        num_users=694_897,
        filter="amazon_five",
    ),
    "ml-1m": PublishedRatings(
        archive=_remote(_GROUPLENS, "ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906"),
        ratings="ratings.dat",
        ratings_bytes=24_594_131,
        options=_without_header("::"),
        num_items=3_706,
        num_users=6_040,
        items=("movies.dat",),
        users=("users.dat",),
    ),
    "ml-20m": PublishedRatings(
        archive=_remote(_GROUPLENS, "ml-20m.zip", "cd245b17a1ae2cc31bb14903e1204af3"),
        ratings="ratings.csv",
        ratings_bytes=533_444_411,
        options=ReadOptions("user=userId,item=movieId,rating,timestamp", ",", header=True, time_unit="s"),
        num_items=26_744,
        num_users=138_493,
        items=("movies.csv",),
    ),
    "ml-100k": PublishedRatings(
        archive=_remote(_GROUPLENS, "ml-100k.zip", "0e33842e24a9c977be4e0107933c0723"),
        ratings="u.data",
        ratings_bytes=1_979_173,
        options=_without_header("\t"),
        num_items=1_682,
        num_users=943,
        items=("u.item", "u.item.tsv"),
        users=("u.user",),
    ),
}


def resolve(
    name: str,
    *,
    raw_path: Path | None = None,
    data_root: Path,
    options: ReadOptions | None = None,
    k_core: int | None = None,
    result_name: str | None = None,
    synthetic: SyntheticBooksSettings | None = None,
    progress: bool = True,
) -> RawRatings:
    """The raw ratings of a data set, downloaded, unpacked or generated where they are not there yet.

    raw_path: a local file, folder or archive (gzip included) instead of a download.
    data_root: raw files are kept under ``data_root / "raw" / name``.
    options: how the raw files are laid out, for ``csv``; of them time_unit and drop_missing for ``exchange-text``, too.
    k_core: filter iteratively until every user and item has this many ratings, in place of the set's own
    filter.
    result_name: name of the prepared data set, `name` if None.

    Raises:
        UserError: unknown name, missing or unreadable file, unsafe or damaged archive, no network, no place.
    """
    source = DATA_SOURCES[name]
    if raw_path is not None and not os.path.exists(raw_path):  # False for a name that is too long
        raise UserError(f"--raw_path={raw_path} does not exist")
    options = options or ReadOptions()
    layout = dataclasses.replace(options, time_unit=None, drop_missing=False) if name == "exchange-text" else options
    if layout != ReadOptions() and name != "csv":
        raise UserError(f"columns, delimiter, header, quotes and times of {name} are known; leave their flags out")
    if k_core is not None and k_core < 1:
        raise UserError(f"--k_core={k_core} must be at least 1")
    if result_name is not None and not re.fullmatch(r"\w[\w.+-]*", result_name):
        raise UserError(f"--name={result_name!r} must consist of letters, digits and . _ + -")
    folder = data_root / "raw" / name
    synthetic = synthetic or SyntheticBooksSettings()
    request = Request(name, folder, raw_path, options, synthetic, progress)
    try:
        raw = source.build({}, {"request": request})
    except OSError as fault:
        raise UserError(f"{fault.filename or folder}: {fault.strerror or fault}") from None
    if k_core is not None:
        raw = dataclasses.replace(raw, filter=f"k_core:{k_core}", expected_items=None, expected_users=None)
    return dataclasses.replace(raw, name=result_name or name)


@register_data_source("synthetic-books")
def _synthetic_books(request: Request) -> RawRatings:
    """Made ratings of made books, with genres, from a seed; nothing is downloaded."""
    if request.raw_path is not None:
        raise UserError("synthetic-books is generated: --raw_path has no meaning for it")
    ratings, books = write_synthetic_books(request.synthetic, request.folder, request.progress)
    return RawRatings(
        name=request.name,
        files=[ratings],
        options=_without_header(","),
        filter="amazon_five",
        item_features=pyarrow.parquet.read_table(books),
        source={"dataset": request.name, "settings": dataclasses.asdict(request.synthetic)},
    )


@register_data_source(*PUBLISHED, gin_name="published")
def _published(request: Request) -> RawRatings:
    """Published sets: the archive is downloaded from several mirrors and checked, or taken from ``--raw_path``."""
    published = PUBLISHED[request.name]
    origin = request.raw_path or fetch(published.archive, request.folder, progress=request.progress)
    files = _find(origin, request.folder, published.ratings, published.items + published.users)
    ratings = files[published.ratings]
    complete = request.raw_path is None or _is_complete(published, origin, ratings)
    return RawRatings(
        name=request.name,
        files=[ratings],
        options=published.options,
        filter=published.filter,
        item_features=_side_table(published.items, files),
        user_features=_side_table(published.users, files),
        expected_items=published.num_items if complete else None,
        expected_users=published.num_users if complete else None,
        source={"dataset": request.name, "input": origin.name, "complete": complete},
    )


def _is_complete(published: PublishedRatings, origin: Path, ratings: Path) -> bool:
    """Whether this is the published data, by the archive's checksum or the size or checksum of the ratings: only then
    do the counts after preparation have to be the published ones."""
    if is_archive(origin) and published.archive.describes(origin):
        return True
    with ratings.open("rb") as source:
        packed = source.read(2) == b"\x1f\x8b"
        size = source.seek(0, os.SEEK_END)
        if packed:  # a gzip file ends with its unpacked size modulo 4 GiB
            source.seek(max(size - 4, 0))
            size = int.from_bytes(source.read(4), "little")
    if published.ratings_bytes is not None:
        return size == published.ratings_bytes
    try:
        return file_digest(ratings, published.archive.algorithm, packed) == published.archive.checksum
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return False  # the reader of the ratings names the place of the damage


@register_data_source("sasrec-text")
def _sasrec_text(request: Request) -> RawRatings:
    """Text of ``user item`` lines in time order, with MovieLens' side files where they lie beside it."""
    origin = _required_path(request)
    files = _find(origin, request.folder, "interactions.txt", ("movies.dat", "users.dat"))
    return RawRatings(
        name=request.name,
        files=[files["interactions.txt"]],
        options=ReadOptions("user,item", " "),
        item_features=_side_table(["movies.dat"], files),
        user_features=_side_table(["users.dat"], files),
        source={"dataset": request.name, "input": origin.name},
    )


@register_data_source("exchange-text")
def _exchange_text(request: Request) -> RawRatings:
    """The text format that HSTU's users exchange, one line a user; ``--export_text`` writes it."""
    origin = _required_path(request)
    return RawRatings(
        name=request.name,
        files=[origin],
        options=dataclasses.replace(request.options, exchange=True, time_unit=request.options.time_unit or "s"),
        source={"dataset": "exchange text", "input": origin.name},
    )


@register_data_source("csv")
def _csv(request: Request) -> RawRatings:
    """Any file or folder: delimited text, JSON lines, Parquet or Arrow, found out or told by ``--columns`` and its
    siblings."""
    origin = _required_path(request)
    if origin.is_dir():
        files = data_files(origin, [path for path in origin.iterdir() if not path.is_dir()])
    elif is_archive(origin):
        folder = _folder_of(origin, request.folder)
        extracted = extract(origin, folder, lambda name: data_suffix(Path(name)) is not None)
        files = data_files(origin, extracted)
    else:
        files = [origin]
    return RawRatings(
        name=request.name,
        files=files,
        options=request.options,
        source={"dataset": request.name, "input": origin.name},
    )


def _required_path(request: Request) -> Path:
    if request.raw_path is None:
        raise UserError(f"--dataset={request.name} needs --raw_path=FILE (a file, folder or archive)")
    return request.raw_path


def _find(origin: Path, folder: Path, ratings: str, side_files: tuple[str, ...]) -> dict[str, Path]:
    """The files of these names (or these and ``.gz``) that a folder or archive holds; archives go to `folder`.

    A file that is no archive holds the ratings, under whatever name. UserError if there are no ratings.
    """
    names = {ratings, *side_files}
    if is_archive(origin):
        candidates = extract(origin, _folder_of(origin, folder), lambda name: name.removesuffix(".gz") in names)
    elif origin.is_file():
        return {ratings: origin}
    else:
        candidates = [path for path in sorted(origin.rglob("*")) if path.is_file()]
    found: dict[str, Path] = {}
    # The file nearest to the top counts: archives and folders also hold copies and samples further down.
    for path in sorted(candidates, key=lambda path: len(path.parts)):
        name = path.name.removesuffix(".gz")
        if name in names:
            found.setdefault(name, path)
    if ratings not in found:
        raise UserError(f"{origin}: holds no {ratings} (or {ratings}.gz)")
    return found


def _folder_of(archive: Path, folder: Path) -> Path:
    """Where an archive is unpacked: beside itself if it was downloaded; otherwise what another archive of the data set
    holds may be read meanwhile."""
    if archive.parent.resolve() == folder.resolve():
        return folder
    return folder / f"{archive.name}-{hashlib.sha256(str(archive.resolve()).encode()).hexdigest()[:8]}"


def _side_table(names: Collection[str], files: dict[str, Path]) -> pa.Table | None:
    """Features from the first side file that is there."""
    return next((movielens.read_side_file(name, files[name]) for name in names if name in files), None)
