"""Synthetic books: the generator's statistics, files and features, and its oracle."""

from __future__ import annotations

import csv
import errno
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.sources import synthetic_books
from generative_recommenders.data.sources.synthetic_books import (
    MAX_LENGTH,
    REDRAWS,
    Steps,
    SyntheticBooksSettings,
    make_steps,
    user_ids,
    write_synthetic_books,
)
from generative_recommenders.data.sources.synthetic_catalogue import (
    GENRES,
    ZIPF_EXPONENT,
    ZIPF_OFFSET,
    BookCatalogue,
    make_catalogue,
)
from generative_recommenders.data.sources.synthetic_oracle import oracle
from generative_recommenders.errors import UserError

DEFAULT = SyntheticBooksSettings()
SMALL = SyntheticBooksSettings(num_users=700, num_items=300)


def generate(settings: SyntheticBooksSettings) -> tuple[BookCatalogue, Steps]:
    catalogue = make_catalogue(settings.num_items, settings.seed)
    return catalogue, make_steps(settings, catalogue, 0, settings.num_users)


@pytest.fixture(scope="module")
def default() -> tuple[BookCatalogue, Steps]:
    return generate(DEFAULT)


def filtered(steps: Steps) -> tuple[int, int, int]:
    """Users, books and ratings that the rule of the Amazon sets leaves, written out plainly."""
    users, items = steps.owners().tolist(), steps.items.tolist()
    of_user, of_item = Counter(users), Counter(items)
    kept = [(u, i) for u, i in zip(users, items) if of_user[u] >= 5 and of_item[i] >= 5]
    left = Counter(u for u, _ in kept)
    kept = [(u, i) for u, i in kept if left[u] >= 5]
    return len({u for u, _ in kept}), len({i for _, i in kept}), len(kept)


def test_default_leaves_about_6000_users_and_3000_books(default: tuple[BookCatalogue, Steps]) -> None:
    users, books, ratings = filtered(default[1])
    assert 5_900 < users < 6_100 and 2_900 < books < 3_100
    assert 10 < ratings / users < 13


def test_lengths_are_heavy_tailed_with_a_floor(default: tuple[BookCatalogue, Steps]) -> None:
    lengths = np.diff(default[1].offsets)
    assert lengths.min() == DEFAULT.min_length and 100 < lengths.max() <= MAX_LENGTH
    assert np.median(lengths) < 0.85 * lengths.mean()
    assert lengths.mean() == pytest.approx(DEFAULT.mean_length, rel=0.05)


@pytest.mark.parametrize("predictability", [0.0, 0.3, 0.8, 1.0])
def test_share_of_predictable_steps_is_as_asked(predictability: float) -> None:
    _, steps = generate(SyntheticBooksSettings(num_users=3_000, predictability=predictability))
    share = steps.predictable[steps.last >= 0].mean()
    deviation = np.sqrt(predictability * (1 - predictability) / len(steps.items))
    assert abs(share - predictability) <= 5 * deviation
    assert not steps.predictable[steps.last < 0].any()


def test_predictable_steps_follow_the_threads_of_the_history(default: tuple[BookCatalogue, Steps]) -> None:
    """Replayed in plain Python: a predictable book is the first unread one after a head."""
    catalogue, steps = default
    behind_last = behind_other = 0
    for reader in range(300):
        read: set[int] = set()
        allowed = [[-1, -1]]
        for row in range(steps.offsets[reader], steps.offsets[reader + 1]):
            last, other = heads = [int(steps.last[row]), int(steps.other[row])]
            assert heads in allowed
            book = int(steps.items[row])
            allowed = [[book, last]]
            if steps.predictable[row]:
                from_last, from_other = (book == _onward(catalogue, head, read) for head in heads)
                allowed = [[book, other]] * from_last + [[book, last]] * (from_other and other >= 0)
                behind_last += from_last and other >= 0
                behind_other += from_other and other >= 0
            assert allowed
            read.add(book)
    assert behind_other / (behind_last + behind_other) == pytest.approx(DEFAULT.interleaving, abs=0.07)


def _onward(catalogue: BookCatalogue, head: int, read: set[int]) -> int:
    """The book after `head`; books read before are passed over, up to a limit."""
    book = int(catalogue.successor[head])
    for _ in range(REDRAWS):
        if book not in read:
            break
        book = int(catalogue.successor[book])
    return book


def test_successors_keep_volumes_in_order_and_authors_together(default: tuple[BookCatalogue, Steps]) -> None:
    catalogue = default[0]
    following = catalogue.successor
    assert sorted(following) == list(range(DEFAULT.num_items))
    assert (following != np.arange(DEFAULT.num_items)).all()
    assert (catalogue.author[following] == catalogue.author).all()
    within = (catalogue.series >= 0) & (catalogue.series[following] == catalogue.series)
    steps_up = catalogue.position[following] - catalogue.position
    volumes = np.bincount(catalogue.series[catalogue.series >= 0])
    assert (steps_up[within] == 1).mean() > 0.95
    assert within.sum() >= (volumes[volumes > 0] - 1).sum()


def test_books_are_hardly_read_twice(default: tuple[BookCatalogue, Steps]) -> None:
    steps = default[1]
    pairs = steps.owners() * DEFAULT.num_items + steps.items
    assert 1 - len(np.unique(pairs)) / len(pairs) < 0.02


def test_tastes_drift_from_one_genre_to_another(default: tuple[BookCatalogue, Steps]) -> None:
    catalogue, steps = default
    owner = steps.owners()
    genre, fresh = catalogue.genre[steps.items], ~steps.predictable
    start, end = genre == steps.start_genre[owner], genre == steps.end_genre[owner]
    moves = (steps.start_genre != steps.end_genre)[owner] & fresh
    early, late = moves & (steps.drift < 0.2), moves & (steps.drift > 0.8)
    assert start[early].mean() > 0.6 and start[late].mean() < 0.35
    assert end[late].mean() > 0.6 and end[early].mean() < 0.35


def test_popularity_is_zipf_at_predictability_0() -> None:
    settings = SyntheticBooksSettings(predictability=0.0)
    catalogue, steps = generate(settings)
    counts = np.bincount(steps.items, minlength=settings.num_items)
    expected = len(steps.items) * catalogue.popularity
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = settings.num_items - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    ranks = np.arange(settings.num_items) + ZIPF_OFFSET
    slope = np.polyfit(np.log(ranks[:500]), np.log(counts[:500]), 1)[0]
    assert slope == pytest.approx(-ZIPF_EXPONENT, abs=0.05)


def test_steps_are_independent_at_predictability_0() -> None:
    """Neither the book before nor the favourite genres tell anything about a step."""
    catalogue, steps = generate(SyntheticBooksSettings(predictability=0.0))
    rows = np.flatnonzero(steps.last >= 0)
    follows = (steps.items[rows] == catalogue.successor[steps.last[rows]]).mean()
    chance = (catalogue.popularity * catalogue.popularity[catalogue.successor]).sum()
    assert follows == pytest.approx(chance, abs=5 * np.sqrt(chance / len(rows)))
    of_genre = np.bincount(catalogue.genre, weights=catalogue.popularity)
    agrees = (catalogue.genre[steps.items] == steps.start_genre[steps.owners()]).mean()
    assert agrees == pytest.approx((of_genre**2).sum(), abs=0.01)


def test_stars_rise_with_the_fit_to_the_taste(default: tuple[BookCatalogue, Steps]) -> None:
    catalogue, steps = default
    fits = catalogue.genre[steps.items] == steps.start_genre[steps.owners()]
    early = steps.drift < 0.3
    assert steps.ratings[early & fits].mean() > steps.ratings[early & ~fits].mean() + 0.5
    assert set(np.unique(steps.ratings)) == {1, 2, 3, 4, 5}


def test_days_never_fall_and_often_tie(default: tuple[BookCatalogue, Steps]) -> None:
    steps = default[1]
    same_reader = np.diff(steps.owners()) == 0
    gaps = np.diff(steps.days)[same_reader]
    assert gaps.min() == 0 and 0.15 < (gaps == 0).mean() < 0.5
    assert steps.days.min() > 12_000 and steps.days.max() < 25_000


@pytest.mark.parametrize("predictability", [0.0, 0.6])
def test_any_chunk_size_writes_the_same_file(tmp_path: Path, predictability: float) -> None:
    settings = SyntheticBooksSettings(num_users=61, num_items=120, predictability=predictability)
    contents = {
        write_synthetic_books(settings, tmp_path / str(size), chunk_users=size)[0].read_bytes()
        for size in (1, 7, 20, 100)
    }
    assert len(contents) == 1


def test_seeds_differ_and_repeat() -> None:
    def items(seed: int) -> list[int]:
        return generate(SyntheticBooksSettings(num_users=50, num_items=100, seed=seed))[1].items.tolist()

    assert items(1) == items(1) != items(2)


def test_file_has_the_amazon_format(tmp_path: Path) -> None:
    ratings, books = write_synthetic_books(SMALL, tmp_path)
    catalogue, steps = generate(SMALL)
    rows = list(csv.reader(ratings.open()))
    assert len(rows) == len(steps.items)
    assert all(len(row) == 4 and len(row[0]) == 14 and row[0][0] == "A" and len(row[1]) == 10 for row in rows)
    assert {row[2] for row in rows} <= {"1.0", "2.0", "3.0", "4.0", "5.0"}
    assert all(int(row[3]) % 86_400 == 0 for row in rows)
    assert len({row[0] for row in rows}) == SMALL.num_users
    assert [row[1] for row in rows[:20]] == catalogue.ids.take(pa.array(steps.items[:20])).to_pylist()
    table = pq.read_table(books)
    assert {row[1] for row in rows} <= set(table["item"].to_pylist())
    assert len(set(table["item"].to_pylist())) == SMALL.num_items


def test_features_of_the_books(default: tuple[BookCatalogue, Steps]) -> None:
    catalogue = default[0]
    table = catalogue.features()
    assert table.column_names == ["item", "author", "genres", "series", "series_position", "price"]
    alone = np.flatnonzero(catalogue.series < 0)
    assert table["series"].is_null().to_numpy().nonzero()[0].tolist() == alone.tolist()
    assert table["series_position"].null_count == len(alone) > 0
    genres = table["genres"].to_pylist()
    assert [each[0] for each in genres] == [GENRES[genre] for genre in catalogue.genre]
    assert {len(set(each)) for each in genres} == {1, 2}
    assert 4 <= min(table["price"].to_pylist()) < max(table["price"].to_pylist()) <= 20
    by_author = dict(zip(table["author"].to_pylist(), catalogue.author.tolist()))
    assert len(by_author) == len(set(catalogue.author.tolist()))


def test_the_same_settings_are_not_generated_again(tmp_path: Path) -> None:
    ratings, _ = write_synthetic_books(SMALL, tmp_path)
    ratings.write_text("kept")
    assert write_synthetic_books(SMALL, tmp_path)[0].read_text() == "kept"
    (tmp_path / "settings.json").write_bytes(b"\xff damaged")
    assert write_synthetic_books(SMALL, tmp_path)[0].read_text() != "kept"
    other = SyntheticBooksSettings(num_users=20, num_items=30)
    assert write_synthetic_books(other, tmp_path)[0].read_text().count("\n") < 2_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books.parquet", "ratings.csv", "settings.json"]


OTHER = SyntheticBooksSettings(num_users=900, num_items=30)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "disk full")])
def test_an_interrupted_run_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    write_synthetic_books(SMALL, tmp_path)
    before = _contents(tmp_path)

    def stopped(settings: SyntheticBooksSettings, catalogue: BookCatalogue, first: int, last: int) -> Steps:
        if first > 0:
            assert any(".tmp-" in path.name for path in tmp_path.iterdir())
            raise stop
        return make_steps(settings, catalogue, first, last)

    monkeypatch.setattr(synthetic_books, "make_steps", stopped)
    with pytest.raises(UserError if isinstance(stop, OSError) else type(stop)):
        write_synthetic_books(OTHER, tmp_path, chunk_users=100)
    assert _contents(tmp_path) == before


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    write_synthetic_books(SMALL, tmp_path)
    before = _contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write_synthetic_books(OTHER, tmp_path, chunk_users=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _contents(tmp_path) == before


def test_the_size_of_the_real_data_set() -> None:
    """8.03 million users with 22.5 million ratings, by a slice of the users."""
    settings = SyntheticBooksSettings(8_026_324, 2_330_066, min_length=1, mean_length=2.75)
    catalogue = make_catalogue(100, settings.seed)
    lengths = np.diff(make_steps(settings, catalogue, 4_000_000, 4_050_000).offsets)
    assert lengths.min() == 1 and lengths.mean() * settings.num_users == pytest.approx(22.5e6, rel=0.03)


def test_user_ids_do_not_depend_on_the_slice() -> None:
    assert user_ids(3, 0, 100).to_pylist()[40:60] == user_ids(3, 40, 60).to_pylist()


@pytest.mark.parametrize("predictability", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("history_filter", "repeats_count"), [(False, True), (True, True), (True, False)])
def test_realised_scores_of_the_oracle_match_its_expectation(
    predictability: float, history_filter: bool, repeats_count: bool
) -> None:
    settings = SyntheticBooksSettings(num_users=2_500, num_items=800, predictability=predictability)
    score = oracle(
        settings,
        cutoffs=(10, 50),
        max_users=2_000,
        history_filter=history_filter,
        repeats_count=repeats_count,
    )
    assert score.realised is not None and score.users == 2_000
    for cutoff in (10, 50):
        margin = 4 * score.noise(cutoff, score.users) + 0.002
        assert score.realised.hit_rate[cutoff] == pytest.approx(score.hit_rate[cutoff], abs=margin)
        assert score.realised.ndcg[cutoff] == pytest.approx(score.ndcg[cutoff], abs=margin)
    assert score.realised.mrr == pytest.approx(score.mrr, abs=4 * 0.5 / np.sqrt(2_000))


def test_oracle_grows_with_predictability_and_beats_the_baselines() -> None:
    scores = [
        oracle(SyntheticBooksSettings(num_users=1_000, num_items=600, predictability=share), max_users=500)
        for share in (0.0, 0.3, 0.6, 0.9)
    ]
    hits = [score.hit_rate[10] for score in scores]
    assert hits == sorted(hits) and hits[2] > 0.6
    markov, popular = _baseline_hits(SyntheticBooksSettings(num_users=1_000, num_items=600, predictability=0.6), 10)
    assert popular + 0.1 < markov < hits[2] - 0.15


def _baseline_hits(settings: SyntheticBooksSettings, cutoff: int) -> tuple[float, float]:
    """Hit rates of the last book's most frequent successors and of the most popular books, history out."""
    _, steps = generate(settings)
    ends = steps.offsets[1:] - 1
    trained = np.ones(len(steps.items), dtype=bool)
    trained[ends] = False
    popular = np.bincount(steps.items[trained], minlength=settings.num_items) / len(steps.items)
    follows = np.zeros((settings.num_items, settings.num_items))
    rows = np.flatnonzero(trained[1:] & (np.diff(steps.owners()) == 0)) + 1
    np.add.at(follows, (steps.items[rows - 1], steps.items[rows]), 1)
    hits = np.zeros((2, len(ends)))
    for reader, (start, end) in enumerate(zip(steps.offsets[:-1], ends)):
        history, target = steps.items[start:end], steps.items[end]
        others = np.setdiff1d(np.arange(settings.num_items), history)
        for row, scores in enumerate((follows[history[-1]] + popular, popular)):
            hits[row, reader] = (scores[others] > scores[target]).sum() < cutoff
    return float(hits[0].mean()), float(hits[1].mean())


def test_ceiling_without_history_filter_is_the_mass_of_the_most_popular() -> None:
    settings = SyntheticBooksSettings(num_users=3_000, num_items=300, predictability=0.0)
    catalogue = make_catalogue(300, settings.seed)
    score = oracle(settings, cutoffs=(1, 10), history_filter=False)
    assert score.hit_rate[10] == pytest.approx(catalogue.popularity[:10].sum(), rel=1e-6)
    assert score.hit_rate[1] == score.ndcg[1] == pytest.approx(catalogue.popularity[0], rel=1e-6)
    assert oracle(settings).hit_rate[10] > score.hit_rate[10]
