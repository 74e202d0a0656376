"""Statistics of a prepared data set, and the summary that names them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.statistics import summary
from ratings_files import PAIRS, prepare_rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("abcde"), st.just(1.0), st.integers(0, 4)),
        min_size=1,
        max_size=40,
    )
)
def test_counts_are_those_of_a_slow_reference(rows, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("reference")
    found = prepare_rows(rows, folder).statistics
    users: dict[str, list] = {}
    for row in rows:
        users.setdefault(row[0], []).append(row)
    sequences = [sorted(events, key=lambda row: row[3]) for events in users.values()]
    pairs = [pair for events in sequences for pair in pairwise(events)]
    scored = [[row[1] for row in events] for events in sequences if len(events) > 2]
    trained = {row[1] for events in sequences for row in (events[:-2] if len(events) > 2 else events)}
    assert found["duplicates"] == len(rows) - len({(row[0], row[1], row[3]) for row in rows})
    assert found["consecutive_repeats"] == sum(a[1] == b[1] for a, b in pairs)
    assert found["tied_events"] == sum(a[3] == b[3] for a, b in pairs)
    assert found["tied_test_targets"] == sum(events[-1][3] == events[-2][3] for events in sequences if len(events) > 2)
    assert found["test_users"] == len(scored)
    assert found["repeated_test_targets"] == sum(items[-1] in items[:-1] for items in scored)
    assert found["unseen_test_targets"] == sum(items[-1] not in trained for items in scored)
    assert found["users_without_test"] == found["users_without_validation"] == len(users) - len(scored)


def test_duplicates_are_counted_and_kept(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("user_id,item_id,rating,timestamp\n" + "u1,i1,5,100\n" * 6)
    text = summary(prepare(RawRatings("t", [tmp_path / "r.csv"]), tmp_path / "out"))
    assert "duplicates (same user, item and time): 5 (83.3 %) of the events are kept; --duplicates=drop" in text
    assert "items that follow themselves: 5 (83.3 %) of the events; --duplicates=consecutive" in text
    dropped = prepare(RawRatings("t", [tmp_path / "r.csv"], duplicates="drop"), tmp_path / "out")
    assert dropped.counts["events"] == 1
    assert "duplicates left out before the filter: 5 (--duplicates=drop)" in summary(dropped)


@pytest.mark.parametrize("padded", [True, False])
def test_a_file_sorted_by_item_inside_ties_is_told(tmp_path: Path, padded: bool) -> None:
    """As in Amazon's files, where an item's ratings stand together: as text, or as numbers without leading zeros."""
    ids = [f"{i:06}" if padded else str(i * 7) for i in range(30)]
    rows = [(f"u{u}", ids[i], 1.0, u + 1) for i in range(30) for u in range(9) if (u + i) % 3]
    text = summary(prepare_rows(rows, tmp_path))
    assert "(100.0 %) of the events share the time of their user's previous event" in text
    assert "and 9 (100.0 %) of the test targets" in text
    assert "sorted by item inside ties" in text and "--tie_order=random" in text
    text = summary(prepare_rows(rows, tmp_path, tie_order="random"))
    assert "(100.0 %) of the events share" in text and "--tie_order=random" in text
    assert "sorted by item" not in text


@pytest.mark.parametrize("ids", ["number", "case", "number inside", "any"])
def test_any_order_of_items_inside_ties_is_told(tmp_path: Path, ids: str) -> None:
    """Items in the file's own order, whose ids say the order as numbers, without case, or not at all."""
    names = {
        "number": [str(n) for n in range(97, 157)] + ["other"],
        "case": sorted((f"{'bB'[n % 2]}{chr(97 + n)}" for n in range(26)), key=str.lower),
        "number inside": [f"item {n} new" for n in range(80, 140)],
        "any": [f"{n * 37 % 61:x}" for n in range(60)],
    }[ids]
    rng = np.random.default_rng(1)
    rows = [
        (f"u{user}", names[item], 1.0, user)
        for user in range(150)
        for item in sorted(rng.choice(len(names), 8, replace=False))
    ]
    assert prepare_rows(rows, tmp_path).statistics["tied_pairs_in_item_order"] > 0.98


def test_an_order_that_users_have_outside_ties_too_is_no_order_of_the_file(tmp_path: Path) -> None:
    """Volumes of a series in their order, most on the day of the one before; the ids do not tell it."""
    names = [f"{n * 37 % 61:x}" for n in range(60)]
    rng = np.random.default_rng(1)
    rows = []
    for user in range(150):
        first, time = int(rng.integers(0, 50)), 1
        for item in range(first, first + 8):
            time += int(rng.random() < 0.4)
            rows.append((f"u{user}", names[item], 1.0, time))
    assert prepare_rows(rows, tmp_path).statistics["tied_pairs_in_item_order"] < 0.9


def test_items_by_chance_are_in_no_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [(f"u{user}", f"i{item}", 1.0, 7) for user in range(150) for item in rng.choice(60, 8, replace=False)]
    assert prepare_rows(rows, tmp_path).statistics["tied_pairs_in_item_order"] < 0.7


def test_repeated_targets_name_the_seen_filter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{u * 5 + i}", 1.0, t) for u in range(20) for t, i in enumerate(rng.integers(0, 4, 12))]
    text = summary(prepare_rows([(u, i, r, int(t)) for u, i, r, t in rows], tmp_path))
    assert "test targets of leave_one_out: 20;" in text
    assert 'seen_filter = "none"' in text
    fresh = [("u", f"i{i}", 1.0, i) for i in range(5)] + [("v", "i1", 1.0, 1)]
    text = summary(prepare_rows(fresh, tmp_path))
    assert "users without a validation target 1, without a test target 1" in text
    assert "0 (0.0 %) are in their user's history, 1 (100.0 %) in no training sequence" in text
    assert "seen_filter" not in text and "ties:" not in text and "duplicates" not in text


def test_ties_are_not_reported_without_times(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("u a\nu a\nu b\nu c\n")
    manifest = prepare(RawRatings("t", [tmp_path / "r.txt"], PAIRS), tmp_path / "out")
    assert "duplicates" not in manifest.statistics and "tied_events" not in manifest.statistics
    assert manifest.statistics["consecutive_repeats"] == 1
    assert "ties" not in summary(manifest)


def test_a_numbered_file_of_one_column_of_ties(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("".join(f"u{n % 3},{n},7\n" for n in range(90)))
    options = ReadOptions("user,item,timestamp", ",", header=False)
    found = prepare(RawRatings("t", [tmp_path / "r.csv"], options), tmp_path / "out").statistics
    assert found["tied_pairs_in_item_order"] == 1.0
    assert found["tied_events"] == 87
