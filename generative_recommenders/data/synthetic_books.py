"""Synthetic book ratings in the Amazon format whose sequences are worth learning.

A reader keeps two threads of reading: the book read last and the last book of the thread before it. A step is
*predictable* with probability ``predictability``: the reader takes the next volume of one of the two threads (the older
one with probability ``interleaving``); behind the last volume comes the author's next work. Otherwise a fresh book
opens a new thread: a genre from the reader's taste, which drifts from one favourite genre to another over the
reader's life, and a book of that genre by Zipf popularity. At ``predictability = 0`` there are neither threads nor
tastes: every step is an independent Zipf draw.

Every random number is a hash of (seed, reader, step, purpose), so the data do not depend on how readers are
chunked, and any slice of readers is made without those before it. `synthetic_oracle` computes the score of a
recommender that knows all this.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from generative_recommenders.features import UserError

GENRES = (
    "Mystery", "Romance", "Fantasy", "Science Fiction", "Thriller", "History", "Biography", "Children", "Horror",
    "Poetry", "Cooking", "Travel",
)  # fmt: skip

ZIPF_EXPONENT = 0.9
ZIPF_OFFSET = 12.0
"""Popularity of the book of rank r = 0, 1, ... is (r + ZIPF_OFFSET) ** -ZIPF_EXPONENT (Zipf-Mandelbrot)."""
BACKGROUND = 0.15
"""Share of fresh draws that ignore the taste and follow popularity over all genres."""
LENGTH_TAIL = 2.5
"""Shape of the Lomax distribution of the ratings a reader has beyond the minimum."""
MAX_LENGTH = 200
FIRST_DAY, LAST_DAY = 12_784, 15_900
"""Readers start between 2005-01-01 and 2013-07-14 (days since 1970)."""


@dataclass(frozen=True)
class SyntheticBooksSettings:
    """What to generate. Counts are those of the raw file; the five-ratings filter leaves about 6,000 and 3,000.

    predictability: probability in [0, 1] that a step follows from the two threads of the reader.
    interleaving: probability in [0, 1] that a predictable step goes on with the older of the two threads.
    min_length, mean_length: ratings a reader; heavy-tailed, at most `MAX_LENGTH`.
    """

    num_users: int = 6_050
    num_items: int = 3_200
    predictability: float = 0.6
    interleaving: float = 0.5
    min_length: int = 6
    mean_length: float = 12.0
    seed: int = 1

    def __post_init__(self) -> None:
        checks = {
            "num_users": self.num_users >= 1,
            "num_items": self.num_items >= 10,
            "predictability": 0 <= self.predictability <= 1,
            "interleaving": 0 <= self.interleaving <= 1,
            "min_length": 1 <= self.min_length <= MAX_LENGTH,
            "mean_length": self.min_length <= self.mean_length <= MAX_LENGTH / 2,
            "seed": 0 <= self.seed < 2**63,
        }
        for name, valid in checks.items():
            if not valid:
                raise UserError(f"synthetic-books: {name} = {getattr(self, name)} is out of range")


@dataclass(frozen=True)
class BookCatalogue:
    """Books by popularity rank; arrays ``[V]``, a book is its rank 0..V-1.

    successor: int64, the book that a predictable step leads to; never the book itself.
    cumulative: float64 ``[V + 1]``, cumulative popularity of the books in the order `by_genre`.
    genre_bounds: int64 ``[G + 1]``, where each genre starts in `by_genre`.
    """

    ids: pa.Array
    author: np.ndarray
    genre: np.ndarray
    second_genre: np.ndarray
    series: np.ndarray
    position: np.ndarray
    price: np.ndarray
    successor: np.ndarray
    popularity: np.ndarray
    by_genre: np.ndarray
    cumulative: np.ndarray
    genre_bounds: np.ndarray

    def features(self) -> pa.Table:
        """Columns item, author, genres (list), series (null: stand-alone), series_position and price."""
        names = pa.array(GENRES)
        alone = self.series < 0
        genres = np.stack([self.genre, self.second_genre], axis=1)
        kept = np.stack([np.ones(len(alone), dtype=bool), self.second_genre >= 0], axis=1)
        offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        return pa.table({
            "item": self.ids,
            "author": _numbered("author-", self.author),
            "genres": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pa.array(genres[kept]))),
            "series": pa.array(_numbered("series-", self.series).to_numpy(zero_copy_only=False), mask=alone),
            "series_position": pa.array(self.position.astype(np.float32), mask=alone),
            "price": pa.array(self.price.astype(np.float32)),
        })  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What the readers ``first_user .. first_user + n - 1`` read, one reader after the other; arrays ``[T]``.

    offsets: int64 ``[n + 1]``. items: int64 ranks. predictable: bool. ratings: 1..5. days: days since 1970.
    last, other: int64, heads of the two threads before the step (-1: none).
    taste: float64 ``[T]``, how far the taste has drifted; start_genre, end_genre: int64 ``[n]``.
    """

    first_user: int
    offsets: np.ndarray
    items: np.ndarray
    predictable: np.ndarray
    ratings: np.ndarray
    days: np.ndarray
    last: np.ndarray
    other: np.ndarray
    taste: np.ndarray
    start_genre: np.ndarray
    end_genre: np.ndarray


def make_catalogue(settings: SyntheticBooksSettings) -> BookCatalogue:
    """The books: works (stand-alone or series of 3 to 8 volumes) of authors who keep to one genre.

    Volumes of a work have neighbouring popularity ranks; an author's works lie anywhere.
    """
    rng = np.random.Generator(np.random.Philox(key=settings.seed))
    count = settings.num_items
    work, position, sizes = _works(rng, count)
    author_of_work = _authors(rng, len(sizes))
    genre_weights = 1 / np.arange(3, len(GENRES) + 3)
    genre_of_author = rng.choice(
        len(GENRES), size=author_of_work.max() + 1, p=genre_weights / genre_weights.sum()
    )
    author = author_of_work[work]
    genre = genre_of_author[author]
    second = np.where(
        rng.random(count) < 0.35, (genre + rng.integers(1, len(GENRES), count)) % len(GENRES), -1
    )
    popularity = (np.arange(count) + ZIPF_OFFSET) ** -ZIPF_EXPONENT
    popularity /= popularity.sum()
    by_genre = np.argsort(genre, kind="stable")
    return BookCatalogue(
        ids=_digits((np.arange(count, dtype=np.uint64) * np.uint64(618_033_989)) % np.uint64(10**10), 10, 10),
        author=author,
        genre=genre,
        second_genre=second,
        series=np.where(sizes[work] > 1, work, -1),
        position=position + 1,
        price=np.round(4 + 12 * rng.random(len(sizes))[work] + 4 * rng.random(count), 2),
        successor=_successors(author),
        popularity=popularity,
        by_genre=by_genre,
        cumulative=np.concatenate([[0.0], np.cumsum(popularity[by_genre])]),
        genre_bounds=np.searchsorted(genre[by_genre], np.arange(len(GENRES) + 1)),
    )


def _works(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = np.where(rng.random(count) < 0.4, 1, rng.integers(3, 9, count))
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), count) + 1]
    work = np.repeat(np.arange(len(sizes)), sizes)[:count]
    sizes = np.bincount(work, minlength=len(sizes))
    return work, np.arange(count) - (np.cumsum(sizes) - sizes)[work], sizes


def _authors(rng: np.random.Generator, num_works: int) -> np.ndarray:
    """Author of each work: shuffled works in groups of 2 to 5, the rest joins the last group."""
    group_sizes = rng.integers(2, 6, num_works)
    groups = np.repeat(np.arange(num_works), group_sizes)[:num_works]
    if num_works > 1 and groups[-1] != groups[-2]:
        groups[-1] = groups[-2]
    author = np.empty(num_works, dtype=np.int64)
    author[rng.permutation(num_works)] = groups
    return author


def _successors(author: np.ndarray) -> np.ndarray:
    """Each author's books in rank order (so volumes in order), closed to a cycle."""
    order = np.argsort(author, kind="stable")
    starts = np.searchsorted(author[order], author[order], side="left")
    ends = np.searchsorted(author[order], author[order], side="right")
    following = np.arange(1, len(order) + 1)
    successor = np.empty_like(order)
    successor[order] = order[np.where(following == ends, starts, following)]
    return successor


def make_steps(settings: SyntheticBooksSettings, catalogue: BookCatalogue, first: int, stop: int) -> Steps:
    """Readers ``first .. stop - 1``; the same numbers whatever slice they are asked for in."""
    users = np.arange(first, stop, dtype=np.uint64)
    uniform = _Uniform(settings.seed)
    lengths = _lengths(settings, uniform(users, 0, "length"))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    genre_of = catalogue.genre
    start_genre = genre_of[_by_popularity(catalogue, uniform(users, 0, "start genre"))]
    end_genre = genre_of[_by_popularity(catalogue, uniform(users, 0, "end genre"))]
    owner = np.repeat(np.arange(len(users)), lengths)
    step = np.arange(offsets[-1]) - offsets[owner]
    taste = step / np.maximum(lengths[owner] - 1, 1)
    keys = users[owner]
    predictable = (uniform(keys, step, "predictable") < settings.predictability) & (step > 0)
    older = uniform(keys, step, "thread") < settings.interleaving
    genre = np.where(uniform(keys, step, "favourite") < taste, end_genre[owner], start_genre[owner])
    if settings.predictability == 0:
        background = np.ones(len(step), dtype=bool)
    else:
        background = uniform(keys, step, "background") < BACKGROUND
    fresh = _fresh_books(catalogue, uniform(keys, step, "book"), genre, background)
    items, last, other = _walk(catalogue.successor, lengths, offsets, predictable, older, fresh)
    match = np.where(genre_of[items] == start_genre[owner], 1 - taste, 0.0)
    match += np.where(genre_of[items] == end_genre[owner], taste, 0.0)
    if settings.predictability == 0:
        match[:] = 0.5
    return Steps(
        first_user=first, offsets=offsets, items=items, predictable=predictable, last=last, other=other, taste=taste,
        ratings=_stars(match, uniform(keys, step, "stars a") + uniform(keys, step, "stars b")),
        days=_days(uniform, users, owner, keys, step, predictable),
        start_genre=start_genre, end_genre=end_genre,
    )  # fmt: skip


class _Uniform:
    """Uniform float64 in [0, 1), a hash of (seed, reader, step, purpose): two rounds of SplitMix64's finaliser."""

    _purposes = (
        "length", "start genre", "end genre", "predictable", "thread", "favourite", "background", "book", "stars a",
        "stars b", "first day", "same day", "gap",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._seed = mix64(np.asarray(seed, dtype=np.uint64))

    def __call__(self, users: np.ndarray, step: np.ndarray | int, purpose: str) -> np.ndarray:
        place = np.asarray(step).astype(np.uint64) * np.uint64(64) + np.uint64(self._purposes.index(purpose))
        bits = mix64(mix64(users ^ self._seed) + place)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): a bijection on uint64 that looks random."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _lengths(settings: SyntheticBooksSettings, uniform: np.ndarray) -> np.ndarray:
    excess = settings.mean_length - settings.min_length
    if excess == 0:
        return np.full(len(uniform), settings.min_length)
    scale = (excess + 0.5) * (LENGTH_TAIL - 1)
    tail = np.floor(scale * ((1 - uniform) ** (-1 / LENGTH_TAIL) - 1))
    return np.minimum(settings.min_length + tail, MAX_LENGTH).astype(np.int64)


def _by_popularity(catalogue: BookCatalogue, uniform: np.ndarray) -> np.ndarray:
    return _fresh_books(
        catalogue, uniform, np.zeros(len(uniform), dtype=np.int64), np.ones(len(uniform), dtype=bool)
    )


def _fresh_books(
    catalogue: BookCatalogue, uniform: np.ndarray, genre: np.ndarray, background: np.ndarray
) -> np.ndarray:
    bounds = catalogue.cumulative[catalogue.genre_bounds]
    low = np.where(background, 0.0, bounds[genre])
    high = np.where(background, bounds[-1], bounds[genre + 1])
    place = np.searchsorted(catalogue.cumulative, low + uniform * (high - low), side="right") - 1
    return catalogue.by_genre[np.clip(place, 0, len(catalogue.by_genre) - 1)]


def _walk(
    successor: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    predictable: np.ndarray,
    older: np.ndarray,
    fresh: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All readers step by step; the readers still reading at a step are a prefix of those sorted by length."""
    longest_first = np.argsort(-lengths, kind="stable")
    starts = offsets[:-1][longest_first]
    reading = np.searchsorted(-lengths[longest_first], -np.arange(lengths.max(initial=0)), side="left")
    head = np.full(len(lengths), -1)
    behind = np.full(len(lengths), -1)
    items, last, other = (np.empty(len(fresh), dtype=np.int64) for _ in range(3))
    for step, active in enumerate(reading):
        rows = starts[:active] + step
        first, second = head[:active], behind[:active]
        last[rows], other[rows] = first, second
        goes_on = predictable[rows]
        from_older = goes_on & older[rows] & (second >= 0)
        book = np.where(goes_on, successor[np.where(from_older, second, first)], fresh[rows])
        behind[:active] = np.where(goes_on & ~from_older, second, first)
        head[:active] = book
        items[rows] = book
    return items, last, other


def _stars(match: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(3.2 + 1.5 * match + 1.8 * (noise - 1)), 1, 5).astype(np.int8)


def _days(
    uniform: _Uniform,
    users: np.ndarray,
    owner: np.ndarray,
    keys: np.ndarray,
    step: np.ndarray,
    predictable: np.ndarray,
) -> np.ndarray:
    """Non-decreasing days; the next volume is often taken on the same day, other gaps are exponential."""
    start = FIRST_DAY + (uniform(users, 0, "first day") * (LAST_DAY - FIRST_DAY)).astype(np.int64)
    same_day = uniform(keys, step, "same day") < np.where(predictable, 0.4, 0.1)
    gap = 1 + (-np.log1p(-uniform(keys, step, "gap")) * 20).astype(np.int64)
    gap[same_day | (step == 0)] = 0
    total = np.cumsum(gap)
    first_row = np.flatnonzero(step == 0)
    return start[owner] + total - total[first_row][owner]


def write_synthetic_books(
    settings: SyntheticBooksSettings, folder: Path, progress: bool = False, chunk_users: int = 100_000
) -> tuple[Path, Path]:
    """Write ``ratings.csv`` (user,item,rating,timestamp, no header) and ``books.parquet`` and return their paths.

    Memory is bounded by `chunk_users` readers and the catalogue. Files already there for the same settings are kept.
    """
    ratings, books, note = folder / "ratings.csv", folder / "books.parquet", folder / "settings.json"
    wanted = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    if all(path.exists() for path in (ratings, books, note)) and note.read_text() == wanted:
        return ratings, books
    folder.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    catalogue = make_catalogue(settings)
    part = folder / "ratings.csv.part"
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    with pyarrow.csv.CSVWriter(part, _rows_schema(), write_options=options) as writer:
        chunks = range(0, settings.num_users, chunk_users)
        for table in tqdm(
            _tables(settings, catalogue, chunk_users), "synthetic-books", len(chunks), disable=not progress
        ):
            writer.write_table(table)
    part.replace(ratings)
    pyarrow.parquet.write_table(catalogue.features(), folder / "books.part")
    (folder / "books.part").replace(books)
    note.write_text(wanted)
    return ratings, books


def _rows_schema() -> pa.Schema:
    names = ("user", "item", "rating", "timestamp")
    return pa.schema(list(zip(names, (pa.string(), pa.string(), pa.string(), pa.int64()))))


def _tables(
    settings: SyntheticBooksSettings, catalogue: BookCatalogue, chunk_users: int
) -> Iterator[pa.Table]:
    stars = pa.array([f"{star}.0" for star in range(6)])
    for first in range(0, settings.num_users, chunk_users):
        stop = min(first + chunk_users, settings.num_users)
        steps = make_steps(settings, catalogue, first, stop)
        owner = np.repeat(np.arange(stop - first), np.diff(steps.offsets))
        columns = [
            user_ids(settings, first, stop).take(pa.array(owner)),
            catalogue.ids.take(pa.array(steps.items)),
            stars.take(pa.array(steps.ratings)),
            pa.array(steps.days * 86_400),
        ]
        yield pa.table(columns, schema=_rows_schema())


def user_ids(settings: SyntheticBooksSettings, first: int, stop: int) -> pa.Array:
    """Fourteen characters each: ``A`` and a 13-digit number of base 36, unlike each other for unlike readers."""
    numbers = mix64(
        np.arange(first, stop, dtype=np.uint64) ^ mix64(np.asarray(settings.seed, dtype=np.uint64))
    )
    return _digits(numbers, 36, 13, prefix="A")


def _digits(numbers: np.ndarray, base: int, width: int, prefix: str = "") -> pa.Array:
    """Fixed-width numerals as a pyarrow string array, without a Python object a row."""
    alphabet = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
    text = np.empty((len(numbers), len(prefix) + width), dtype=np.uint8)
    text[:, : len(prefix)] = np.frombuffer(prefix.encode(), dtype=np.uint8)
    for column in range(text.shape[1] - 1, len(prefix) - 1, -1):
        text[:, column] = alphabet[(numbers % np.uint64(base)).astype(np.int64)]
        numbers = numbers // np.uint64(base)
    offsets = np.arange(len(text) + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(text))


def _numbered(prefix: str, numbers: np.ndarray) -> pa.Array:
    return _digits(np.maximum(numbers, 0).astype(np.uint64), 10, 7, prefix=prefix)
