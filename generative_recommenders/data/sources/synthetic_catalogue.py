"""Catalogue of the synthetic books: works, authors, genres, popularity, and the book that follows each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

GENRES = (
    "Mystery", "Romance", "Fantasy", "Science Fiction", "Thriller", "History",
    "Biography", "Children", "Horror", "Poetry", "Cooking", "Travel",
)  # fmt: skip
ZIPF_EXPONENT = 0.9
ZIPF_OFFSET = 12.0
"""Popularity of the book of rank r = 0, 1, ... is (r + ZIPF_OFFSET) ** -ZIPF_EXPONENT (Zipf-Mandelbrot)."""
_ALONE_SHARE = 0.4
_SECOND_GENRE_SHARE = 0.35


@dataclass(frozen=True)
class BookCatalogue:
    """Books by popularity rank, the most popular first; arrays ``[V]``, a book is its rank 0..V-1.

    ids: ten digits each. author, genre: int64. second_genre: int64, -1 for none. series: int64, -1 for
    stand-alone books. position: volume number from 1. price: float64. popularity: float64, sums to 1.
    successor: int64, the book that a predictable step leads to; never the book itself.
    by_genre: int64, the books sorted by genre. cumulative: float64 ``[V + 1]``, their cumulative popularity.
    genre_bounds: int64 ``[G + 1]``, where each genre starts in `by_genre`.
    """

    ids: pa.Array
    author: np.ndarray
    genre: np.ndarray
    second_genre: np.ndarray
    series: np.ndarray
    position: np.ndarray
    price: np.ndarray
    popularity: np.ndarray
    successor: np.ndarray
    by_genre: np.ndarray
    cumulative: np.ndarray
    genre_bounds: np.ndarray

    def features(self) -> pa.Table:
        """Columns item, author, genres (list), series and series_position (null: stand-alone), price."""
        alone = self.series < 0
        genres = np.stack([self.genre, self.second_genre], axis=1)
        kept = genres >= 0
        offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        genre_names = pa.array(GENRES).take(pa.array(genres[kept]))
        series = pa.array(self.series, mask=alone)
        series_names = numerals(np.arange(self.series.max() + 1), 10, 7, "series-").take(series)
        return pa.table({
            "item": self.ids,
            "author": numerals(self.author, 10, 7, "author-"),
            "genres": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), genre_names),
            "series": series_names,
            "series_position": pa.array(self.position.astype(np.float32), mask=alone),
            "price": pa.array(self.price.astype(np.float32)),
        })  # fmt: skip

    def draw(self, uniform: np.ndarray, genre: np.ndarray | None = None) -> np.ndarray:
        """A book for every number in [0, 1), by popularity, of the given genre or of all."""
        bounds = self.cumulative[self.genre_bounds]
        low = bounds[0] if genre is None else bounds[genre]
        high = bounds[-1] if genre is None else bounds[genre + 1]
        place = np.searchsorted(self.cumulative, low + uniform * (high - low), side="right") - 1
        return self.by_genre[np.clip(place, 0, len(self.by_genre) - 1)]


def make_catalogue(num_items: int, seed: int) -> BookCatalogue:
    """Works (stand-alone or series of 3 to 8 volumes) of authors who keep to one main genre.

    Volumes of a work are neighbours in popularity; an author's works lie anywhere. Every author has two
    books or more.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))  # whose draws keep their order: a seed is a catalogue
    sizes = np.where(rng.random(num_items) < _ALONE_SHARE, 1, rng.integers(3, 9, num_items))
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), num_items) + 1]
    work = np.repeat(np.arange(len(sizes)), sizes)[:num_items]
    sizes = np.bincount(work, minlength=len(sizes))  # the last work may be cut
    position = np.arange(num_items) - (np.cumsum(sizes) - sizes)[work]
    # Shuffled works in groups of 2 to 5; one left over joins the last group.
    groups = np.repeat(np.arange(len(sizes)), rng.integers(2, 6, len(sizes)))[: len(sizes)]
    if len(sizes) > 1:
        groups[-1] = groups[-2]
    author_of_work = np.empty(len(sizes), dtype=np.int64)
    author_of_work[rng.permutation(len(sizes))] = groups
    author = author_of_work[work]
    genre_weights = 1 / np.arange(3, len(GENRES) + 3)
    genre_of_author = rng.choice(len(GENRES), size=author.max() + 1, p=genre_weights / genre_weights.sum())
    genre = genre_of_author[author]
    second = (genre + rng.integers(1, len(GENRES), num_items)) % len(GENRES)
    popularity = (np.arange(num_items) + ZIPF_OFFSET) ** -ZIPF_EXPONENT
    popularity /= popularity.sum()
    by_genre = np.argsort(genre, kind="stable")
    # Ids are multiples of a number coprime to 10^10: distinct, and in an order that does not tell the popularity.
    return BookCatalogue(
        ids=numerals(np.arange(num_items, dtype=np.uint64) * np.uint64(618_033_989) % np.uint64(10**10), 10, 10),
        author=author,
        genre=genre,
        second_genre=np.where(rng.random(num_items) < _SECOND_GENRE_SHARE, second, -1),
        series=np.where(sizes[work] > 1, work, -1),
        position=position + 1,
        price=np.round(4 + 12 * rng.random(len(sizes))[work] + 4 * rng.random(num_items), 2),
        popularity=popularity,
        successor=_successors(author),
        by_genre=by_genre,
        cumulative=np.concatenate([[0.0], np.cumsum(popularity[by_genre])]),
        genre_bounds=np.searchsorted(genre[by_genre], np.arange(len(GENRES) + 1)),
    )


def numerals(numbers: np.ndarray, base: int, width: int, prefix: str = "") -> pa.Array:
    """Fixed-width numerals of non-negative integers as strings, without a Python object a row."""
    alphabet = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
    rest = numbers.astype(np.uint64)
    text = np.empty((len(rest), len(prefix) + width), dtype=np.uint8)
    text[:, : len(prefix)] = np.frombuffer(prefix.encode(), dtype=np.uint8)
    for column in range(text.shape[1] - 1, len(prefix) - 1, -1):
        text[:, column] = alphabet[(rest % np.uint64(base)).astype(np.int64)]
        rest = rest // np.uint64(base)
    offsets = np.arange(len(text) + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(text))


def _successors(author: np.ndarray) -> np.ndarray:
    """Each author's books in rank order (so volumes in order), closed to a cycle."""
    order = np.argsort(author, kind="stable")
    starts = np.searchsorted(author[order], author[order], side="left")
    ends = np.searchsorted(author[order], author[order], side="right")
    following = np.arange(1, len(order) + 1)
    following = np.where(following == ends, starts, following)
    successor = np.empty_like(order)
    successor[order] = order[following]
    return successor
