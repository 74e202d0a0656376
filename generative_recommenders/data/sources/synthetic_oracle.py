"""Best possible scores on the synthetic books: those of a recommender that knows the generator and every reader's
taste.

Each step of the generator has a known distribution over the next book, given the reader's two threads,
taste and books read. Ranking by it is optimal, and the expectation of a metric over it is exact (up to the
few readers who exhaust `REDRAWS`). So nothing that is measured on these data should beat it by more than
the noise of drawing the targets, and tests can set floors as a share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.preparation.event_store import consecutive
from generative_recommenders.data.sources.synthetic_books import (
    BACKGROUND,
    REDRAWS,
    Steps,
    SyntheticBooksSettings,
    make_steps,
)
from generative_recommenders.data.sources.synthetic_catalogue import BookCatalogue, make_catalogue
from generative_recommenders.errors import UserError

_FIVE = 5
_CELLS = 2**24


@dataclass(frozen=True)
class OracleScore:
    """Expected metrics at the last rating of each user: cut-off to HR and NDCG, and MRR.

    users: how many targets the expectation was averaged over.
    realised: the same metrics counted on the targets that the generator happened to draw.
    """

    hit_rate: dict[int, float]
    ndcg: dict[int, float]
    mrr: float
    users: int
    realised: OracleScore | None = None

    def noise(self, cutoff: int, users: int) -> float:
        """Standard deviation of a hit rate at `cutoff` that is measured on `users` users."""
        hits = self.hit_rate[cutoff]
        return float(np.sqrt(hits * (1 - hits) / users))


def oracle(
    settings: SyntheticBooksSettings,
    *,
    cutoffs: Sequence[int] = (1, 10, 50),
    max_users: int = 2_000,
    history_filter: bool = True,
    repeats_count: bool = True,
) -> OracleScore:
    """Expected scores for the last kept rating of `max_users` users, after the five-ratings filter.

    history_filter: whether books the user had before are taken out of the ranking, unless they are the
    target. A book read again then competes with unseen books only, so that the best ranking puts it first; it is a miss
    where not repeats_count, as under ``train_fn.seen_filter = "history"``.

    All ratings are generated in memory, about 400 bytes each; a user of the sample then takes a sort of all books.
    """
    catalogue = make_catalogue(settings.num_items, settings.seed)
    steps = make_steps(settings, catalogue, 0, settings.num_users)
    owner = steps.owners()
    # As `preparation.order` counts: users and books at once, and then users once more.
    frequent = np.bincount(steps.items, minlength=settings.num_items)[steps.items] >= _FIVE
    kept = np.flatnonzero(frequent & (np.diff(steps.offsets)[owner] >= _FIVE))
    kept = kept[np.bincount(owner[kept], minlength=settings.num_users)[owner[kept]] >= _FIVE]
    last_kept = np.unique(owner[kept][::-1], return_index=True)[1]
    rows = kept[::-1][last_kept]
    if len(rows) == 0:
        raise UserError("synthetic-books: no user is left after the five-ratings filter")
    rows = rows[np.linspace(0, len(rows) - 1, min(max_users, len(rows))).astype(np.int64)]
    available = np.zeros(settings.num_items, dtype=bool)
    available[steps.items[kept]] = True
    # Targets at each rank from 0, expected and drawn; the last place, below all, is a miss.
    expected, realised = np.zeros(settings.num_items + 1), np.zeros(settings.num_items + 1)
    for block in np.array_split(rows, -(-len(rows) * settings.num_items // _CELLS)):
        seen = _books_before(steps, owner, block, settings.num_items)
        probability = _next_book(settings, catalogue, steps, owner, block, seen) * available
        probability /= probability.sum(axis=1, keepdims=True)
        filtered = seen & available if history_filter else np.zeros_like(seen)
        filtered_rank = 0 if repeats_count else settings.num_items
        expected[filtered_rank] += probability[filtered].sum()
        # What is filtered competes with nobody: ranked below all others, and there without a probability.
        competing = np.where(~filtered & available, probability, -1.0)
        target = steps.items[block]
        own = competing[np.arange(len(block)), target][:, None]
        first = np.arange(settings.num_items) < target[:, None]
        drawn = ((competing > own) | (first & (competing == own))).sum(axis=1)
        drawn = np.where(own[:, 0] < 0, filtered_rank, drawn)
        realised += np.bincount(drawn, minlength=len(realised))
        competing.sort(axis=1)
        expected[:-1] += competing[:, ::-1].clip(min=0).sum(axis=0)
    return _score(expected, cutoffs, len(rows), _score(realised, cutoffs, len(rows)))


def _score(by_rank: np.ndarray, cutoffs: Sequence[int], users: int, realised: OracleScore | None = None) -> OracleScore:
    """Metrics of ``users`` targets, of which so many have each rank: ``[V + 1]``, the last for misses."""
    ranked, place = by_rank[:-1], np.arange(1, len(by_rank))
    gains = ranked / np.log2(place + 1)
    return OracleScore(
        hit_rate={cutoff: float(ranked[:cutoff].sum() / users) for cutoff in cutoffs},
        ndcg={cutoff: float(gains[:cutoff].sum() / users) for cutoff in cutoffs},
        mrr=float((ranked / place).sum() / users),
        users=users,
        realised=realised,
    )


def _books_before(steps: Steps, owner: np.ndarray, rows: np.ndarray, num_items: int) -> np.ndarray:
    """bool ``[n, V]``: what the readers of these rows had read before them."""
    starts = steps.offsets[owner[rows]]
    counts = rows - starts
    reader = np.repeat(np.arange(len(rows)), counts)
    seen = np.zeros((len(rows), num_items), dtype=bool)
    seen[reader, steps.items[consecutive(starts, counts)]] = True
    return seen


def _next_book(
    settings: SyntheticBooksSettings,
    catalogue: BookCatalogue,
    steps: Steps,
    owner: np.ndarray,
    rows: np.ndarray,
    seen: np.ndarray,
) -> np.ndarray:
    """float64 ``[n, V]``: probability of each book at each of these rows, as the generator draws it."""
    if settings.predictability == 0:
        return np.broadcast_to(catalogue.popularity, seen.shape)
    reader = owner[rows]
    drift = steps.drift[rows][:, None]
    taste = (1 - drift) * _within_genre(catalogue, steps.start_genre[reader])
    taste = taste + drift * _within_genre(catalogue, steps.end_genre[reader])
    fresh = (BACKGROUND * catalogue.popularity + (1 - BACKGROUND) * taste) * ~seen
    threaded = np.where(steps.last[rows] >= 0, settings.predictability, 0.0)
    probability = fresh / fresh.sum(axis=1, keepdims=True) * (1 - threaded)[:, None]
    older = np.where(steps.other[rows] >= 0, settings.interleaving, 0.0)
    for head, share in ((steps.last[rows], 1 - older), (steps.other[rows], older)):
        readers, book = np.arange(len(rows)), catalogue.successor[head]
        for _ in range(REDRAWS):
            book = np.where(seen[readers, book], catalogue.successor[book], book)
        np.add.at(probability, (readers, book), threaded * share)
    return probability


def _within_genre(catalogue: BookCatalogue, genre: np.ndarray) -> np.ndarray:
    of_genre = np.where(catalogue.genre == genre[:, None], catalogue.popularity, 0.0)
    return of_genre / of_genre.sum(axis=1, keepdims=True)
