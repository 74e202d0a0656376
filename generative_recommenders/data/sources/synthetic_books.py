"""Synthetic book ratings in the Amazon format, with sequences that a model can learn to a known degree.

A reader keeps two threads of reading: the book read last, and the last book of the thread before it. A step
is *predictable* with probability ``predictability``: the reader takes the next volume of one of the two
threads (the older one with probability ``interleaving``); after the last volume comes the author's next
work. Otherwise a fresh book opens a new thread: a genre by the reader's taste, which drifts from one
favourite genre to another over the reader's life, and a book of that genre by Zipf popularity. Books read
before are passed over. At ``predictability = 0`` there are neither threads nor tastes nor memory: every step
is an independent Zipf draw.

Every random number is a hash of (seed, reader, step, purpose), so the data do not depend on how readers are
cut into chunks, and any slice of readers is made without those before it. `synthetic_oracle` computes
the best possible score, that of a recommender which knows all this.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from generative_recommenders.data.preparation.digests import mix
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.sources.synthetic_catalogue import BookCatalogue, make_catalogue, numerals
from generative_recommenders.errors import UserError

BACKGROUND = 0.15
"""Share of fresh draws that ignore the taste and follow popularity over all genres."""
MAX_LENGTH = 200
LENGTH_TAIL = 2.5
"""Shape of the Lomax distribution of the ratings that a reader has beyond the minimum."""
REDRAWS = 8
"""How often a reader passes over books read before; then one is read again."""
FIRST_DAY, LAST_DAY = 12_784, 15_900
"""Readers start between 2005-01-01 and 2013-07-14 (days since 1970)."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class SyntheticBooksSettings:
    """Settings of the generator. Counts are those of the raw file: the filter leaves about 6,000 users and 3,000 books.

    predictability: probability in [0, 1] that a step continues one of the reader's two threads.
    interleaving: probability in [0, 1] that such a step continues the older of the two.
    min_length, mean_length: ratings a reader; heavy-tailed, at most `MAX_LENGTH`.

    The size of the real Amazon Books: 8_026_324 users, 2_330_066 items, min_length 1, mean_length 2.75.
    """

    num_users: int = 6_050
    num_items: int = 3_200
    predictability: float = 0.65
    interleaving: float = 0.6
    min_length: int = 6
    mean_length: float = 12.0
    seed: int = 1

    def __post_init__(self) -> None:
        bounds = {
            "num_users": (1, 2**63 - 1),
            "num_items": (10, 2**31 - 1),
            "predictability": (0, 1),
            "interleaving": (0, 1),
            "min_length": (1, MAX_LENGTH),
            "mean_length": (self.min_length, MAX_LENGTH),
            "seed": (0, 2**63 - 1),
        }
        for name, (lowest, highest) in bounds.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                least = f"min_length = {lowest}" if name == "mean_length" else lowest
                raise UserError(f"synthetic-books: {name} = {value} is out of range, {least} to {highest}")


@dataclass(frozen=True)
class Steps:
    """Events of a slice of readers, one reader after the other; arrays are ``[T]`` where no other shape is given.

    offsets: int64 ``[n + 1]``. items: int64, the books' ranks. predictable: bool. ratings: int8, 1..5 stars.
    days: int64, since 1970, never falling. last, other: int64, heads of the two threads before the step
    (-1: none).
    drift: float64 in [0, 1], how far the taste has moved from start_genre to end_genre (int64 ``[n]``).
    """

    offsets: np.ndarray
    items: np.ndarray
    predictable: np.ndarray
    ratings: np.ndarray
    days: np.ndarray
    last: np.ndarray
    other: np.ndarray
    drift: np.ndarray
    start_genre: np.ndarray
    end_genre: np.ndarray

    def owners(self) -> np.ndarray:
        """int64 ``[T]``: which reader of the slice each step belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def make_steps(settings: SyntheticBooksSettings, catalogue: BookCatalogue, first: int, stop: int) -> Steps:
    """Readers ``first .. stop - 1``; the same numbers whatever slice they are asked for in."""
    users = np.arange(first, stop, dtype=np.uint64)
    uniform = _Uniform(settings.seed)
    # Ratings beyond the minimum are Lomax distributed, by the inverse of its cumulative distribution; rounding down
    # costs half a rating in the mean, which the scale gives back.
    excess = settings.mean_length - settings.min_length
    scale = (excess + 0.5) * (LENGTH_TAIL - 1) if excess > 0 else 0.0
    tail = np.floor(scale * ((1 - uniform(users, 0, "length")) ** (-1 / LENGTH_TAIL) - 1))
    lengths = np.minimum(settings.min_length + tail, MAX_LENGTH).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(users)), lengths)
    step = np.arange(offsets[-1]) - offsets[owner]
    keys = users[owner]
    drift = step / np.maximum(lengths[owner] - 1, 1)
    start_genre = catalogue.genre[catalogue.draw(uniform(users, 0, "start genre"))]
    end_genre = catalogue.genre[catalogue.draw(uniform(users, 0, "end genre"))]
    has_taste = settings.predictability > 0

    def fresh(rows: np.ndarray, attempt: int) -> np.ndarray:
        """Books that open a thread at these rows, all draws anew for every attempt."""
        place = (keys[rows], step[rows] * (REDRAWS + 1) + attempt)
        everything = catalogue.draw(uniform(*place, "book"))
        if not has_taste:
            return everything
        moved = uniform(*place, "favourite") < drift[rows]
        genre = np.where(moved, end_genre[owner[rows]], start_genre[owner[rows]])
        by_taste = catalogue.draw(uniform(*place, "book"), genre)
        return np.where(uniform(*place, "background") < BACKGROUND, everything, by_taste)

    predictable = (uniform(keys, step, "predictable") < settings.predictability) & (step > 0)
    older = uniform(keys, step, "thread") < settings.interleaving
    attempts = REDRAWS if has_taste else 0
    items, last, other = _walk(offsets, catalogue.successor, predictable, older, fresh, attempts)
    genre = catalogue.genre[items]
    match = (genre == start_genre[owner]) * (1 - drift) + (genre == end_genre[owner]) * drift
    # Stars rise with how well the book's genre fits the taste; the sum of two uniform numbers is triangular noise.
    noise = uniform(keys, step, "stars a") + uniform(keys, step, "stars b") - 1
    stars = np.rint(3.2 + 1.5 * (match if has_taste else 0.5) + 1.8 * noise)
    return Steps(
        offsets=offsets,
        items=items,
        predictable=predictable,
        ratings=np.clip(stars, 1, 5).astype(np.int8),
        days=_days(uniform, users, owner, step, predictable),
        last=last,
        other=other,
        drift=drift,
        start_genre=start_genre,
        end_genre=end_genre,
    )


def write_synthetic_books(
    settings: SyntheticBooksSettings, folder: Path, progress: bool = False, chunk_users: int = 50_000
) -> tuple[Path, Path]:
    """Write ``ratings.csv`` (user,item,rating,timestamp, no header) and ``books.parquet``; return their
    paths.

    Memory is bounded by `chunk_users` readers and the catalogue. Files made with the same settings are kept.
    Files of other settings stay as they are until the new ones are whole.
    """
    ratings, books, note = folder / "ratings.csv", folder / "books.parquet", folder / "settings.json"
    wanted = json.dumps({"generator": 1, **dataclasses.asdict(settings)}, sort_keys=True).encode()
    if all(path.exists() for path in (ratings, books, note)) and note.read_bytes() == wanted:
        return ratings, books
    catalogue = make_catalogue(settings.num_items, settings.seed)
    stars = pa.array([f"{star}.0" for star in range(6)])
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    # The note is taken away first and comes last: whole files without it are made again, never mistaken for these
    # settings.
    with new_file(note) as new_note, new_file(books) as new_books, new_file(ratings) as new_ratings:
        with (
            pyarrow.csv.CSVWriter(new_ratings, _ROWS, write_options=options) as writer,
            tqdm(total=settings.num_users, desc="synthetic-books", unit=" users", disable=not progress) as bar,
        ):
            for first in range(0, settings.num_users, chunk_users):
                stop = min(first + chunk_users, settings.num_users)
                steps = make_steps(settings, catalogue, first, stop)
                columns = [
                    user_ids(settings.seed, first, stop).take(pa.array(steps.owners())),
                    catalogue.ids.take(pa.array(steps.items)),
                    stars.take(pa.array(steps.ratings)),
                    pa.array(steps.days * SECONDS_A_DAY),
                ]
                writer.write_table(pa.table(columns, schema=_ROWS))
                bar.update(stop - first)
        pyarrow.parquet.write_table(catalogue.features(), new_books)
        new_note.write_bytes(wanted)
        note.unlink(missing_ok=True)
    return ratings, books


def user_ids(seed: int, first: int, stop: int) -> pa.Array:
    """Distinct ids of fourteen characters: ``A`` and 13 digits of base 36."""
    numbers = mix64(np.arange(first, stop, dtype=np.uint64) ^ mix64(np.asarray(seed, dtype=np.uint64)))
    return numerals(numbers, 36, 13, prefix="A")


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): a bijection on uint64 that looks random."""
    with np.errstate(over="ignore"):
        return mix(values + np.uint64(0x9E3779B97F4A7C15))


_ROWS = pa.schema([
    ("user", pa.string()), ("item", pa.string()), ("rating", pa.string()), ("timestamp", pa.int64()),
])  # fmt: skip


class _Uniform:
    """Uniform float64 in [0, 1) as a hash of (seed, reader, place, purpose)."""

    _purposes = (
        "length", "start genre", "end genre", "predictable", "thread", "favourite", "background", "book",
        "stars a", "stars b", "first day", "same day", "gap",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._seed = mix64(np.asarray(seed, dtype=np.uint64))

    def __call__(self, users: np.ndarray, place: np.ndarray | int, purpose: str) -> np.ndarray:
        # 64 slots a place leave room for new purposes, which change no number that is drawn today.
        slot = np.asarray(place).astype(np.uint64) * np.uint64(64) + np.uint64(self._purposes.index(purpose))
        bits = mix64(mix64(users ^ self._seed) + slot)
        # The upper 53 bits: as many as a float64 holds exactly.
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _walk(
    offsets: np.ndarray,
    successor: np.ndarray,
    predictable: np.ndarray,
    older: np.ndarray,
    fresh: Callable[[np.ndarray, int], np.ndarray],
    attempts: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of all steps of all readers of a slice, and the heads of both threads before each; arrays ``[T]`` as in
    `Steps`.

    older: whether the older thread continues. attempts: to pass over books read before. Readers are sorted, longest
    first, so that those who still read at a step are a prefix.
    """
    lengths = np.diff(offsets)
    longest_first = np.argsort(-lengths, kind="stable")
    starts = offsets[:-1][longest_first]
    steps = np.arange(lengths.max(initial=0))
    reading = np.searchsorted(-lengths[longest_first], -steps, side="left")
    read = np.full((len(lengths), len(steps)), -1, dtype=np.int32)
    heads = np.full((2, len(lengths)), -1)  # newest and older thread
    items, last, other = (np.empty(offsets[-1], dtype=np.int64) for _ in range(3))
    for step, active in zip(steps, reading):
        rows = starts[:active] + step
        newest, older_head = last[rows], other[rows] = heads[:, :active]
        continues = predictable[rows]
        # Where there is no older thread yet, the newest one continues.
        from_older = continues & older[rows] & (older_head >= 0)
        book = np.where(continues, successor[np.where(from_older, older_head, newest)], -1)
        book[~continues] = fresh(rows[~continues], 0)
        for attempt in range(1, attempts + 1):
            again = np.flatnonzero((read[:active, :step] == book[:, None]).any(axis=1))
            if len(again) == 0:
                break
            onward = continues[again]
            book[again[onward]] = successor[book[again[onward]]]
            book[again[~onward]] = fresh(rows[again[~onward]], attempt)
        heads[:, :active] = book, np.where(continues & ~from_older, older_head, newest)
        read[:active, step] = book
        items[rows] = book
    return items, last, other


def _days(
    uniform: _Uniform, users: np.ndarray, owner: np.ndarray, step: np.ndarray, predictable: np.ndarray
) -> np.ndarray:
    """Days of all steps, never falling within a reader: next volumes often come on the same day, other gaps are
    exponential."""
    keys = users[owner]
    start = FIRST_DAY + (uniform(users, 0, "first day") * (LAST_DAY - FIRST_DAY)).astype(np.int64)
    same_day = uniform(keys, step, "same day") < np.where(predictable, 0.4, 0.1)
    gap = 1 + (-np.log1p(-uniform(keys, step, "gap")) * 20).astype(np.int64)
    gap[same_day | (step == 0)] = 0
    total = np.cumsum(gap)
    return start[owner] + total - total[np.flatnonzero(step == 0)][owner]
