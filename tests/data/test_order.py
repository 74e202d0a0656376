"""Order of events of one time, and duplicates, against slow references."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.prepare import DEFAULT_MEMORY_LIMIT, prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from ratings_files import COMMAS, PAIRS, Row, write_csv


def prepared(rows: list[Row], folder: Path, **choices: str) -> tuple[Manifest, dict[str, list[str]]]:
    """The manifest and every user's items."""
    memory = int(choices.pop("memory", DEFAULT_MEMORY_LIMIT))
    path = write_csv(folder / "r.csv", rows)
    manifest = prepare(RawRatings("t", [path], COMMAS, **choices), folder / "out", memory)
    dataset = SequenceDataset.open(folder / "out")
    dataset.verify()
    ids = dataset.original_item_ids().to_pylist()
    bounds = zip(dataset.original_user_ids().to_pylist(), dataset.offsets[:-1], dataset.offsets[1:])
    return manifest, {user: [ids[i - 1] for i in dataset.items[a:b]] for user, a, b in bounds}


row_strategy = st.tuples(
    st.sampled_from("uvw"), st.sampled_from("abcd"), st.sampled_from([1.0, 2.0]), st.integers(0, 2)
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(row_strategy, min_size=1, max_size=50),
    duplicates=st.sampled_from(["keep", "drop", "consecutive"]),
    order=st.sampled_from(["file", "random"]),
    filter_name=st.sampled_from(["none", "k_core:2"]),
    memory=st.sampled_from([1, 700, DEFAULT_MEMORY_LIMIT]),
)
def test_duplicates_are_dropped_before_the_filter(rows, duplicates, order, filter_name, memory) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if duplicates == "drop":
            kept = list(dict.fromkeys((user, item, time) for user, item, _, time in rows))
            counts = Counter((user, item) for user, item, _ in kept)
        elif duplicates == "consecutive":
            # the sequences as they stand, then what is to go: rows come back as (user, item) in their order
            _, everything = prepared(rows, Path(folder), tie_order=order)
            runs = {
                u: [x for x, before in zip(items, [None, *items]) if x != before] for u, items in everything.items()
            }
            counts = Counter((user, item) for user, items in runs.items() for item in items)
        else:
            counts = Counter((user, item) for user, item, _, _ in rows)
        while filter_name == "k_core:2":
            users, items = Counter(), Counter()
            for (user, item), n in counts.items():
                users[user] += n
                items[item] += n
            left = {pair: n for pair, n in counts.items() if users[pair[0]] >= 2 and items[pair[1]] >= 2}
            if left == dict(counts):
                break
            counts = Counter(left)
        choices = {
            "tie_order": order,
            "duplicates": duplicates,
            "filter": filter_name,
            "memory": str(memory),
        }
        if not counts:
            with pytest.raises(UserError, match="no rating is left"):
                prepared(rows, Path(folder), **choices)
            return
        manifest, sequences = prepared(rows, Path(folder), **choices)
        assert Counter((user, item) for user, items in sequences.items() for item in items) == counts
        if duplicates == "consecutive" and filter_name == "none":
            assert sequences == runs
        assert manifest.choices == {"tie_order": order, "duplicates": duplicates}
        if duplicates == "keep":
            assert manifest.statistics["dropped_duplicates"] == 0


def test_random_order_keeps_times_and_does_not_depend_on_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = [(f"u{u}", f"i{i}", 1.0, int(t)) for u in range(40) for i, t in enumerate([1] * 8 + [2] * 8)]
    one, first = prepared(rows, tmp_path, tie_order="random")
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    two, second = prepared(shuffled, tmp_path, tie_order="random")
    assert (one.data_hash, first) == (two.data_hash, second)
    file, as_is = prepared(rows, tmp_path)
    assert file.data_hash != one.data_hash
    assert file.split_hashes["leave_one_out"] != one.split_hashes["leave_one_out"]
    for user, items in first.items():
        assert items != as_is[user]
        assert set(items[:8]) == set(as_is[user][:8])
    places = [items.index("i0") for items in first.values()]
    assert 1.5 < np.mean(places) < 5.5  # 3.5 is chance; users do not share one order
    assert file.statistics["tied_pairs_in_item_order"] == 1.0
    assert one.statistics["tied_pairs_in_item_order"] < 0.7


def test_events_that_are_equal_in_all_three_are_ordered_apart(tmp_path: Path) -> None:
    rows: list[Row] = [("u", item, 1.0, 5) for item in "ababab"]
    _, sequences = prepared(rows, tmp_path, tie_order="random")
    assert sorted(sequences["u"]) == sorted("ababab")
    _, dropped = prepared(rows, tmp_path, tie_order="random", duplicates="drop")
    assert sorted(dropped["u"]) == ["a", "b"]


def test_of_duplicates_the_first_stays(tmp_path: Path) -> None:
    rows = [("u", "a", 1.0, 5), ("u", "b", 2.0, 5), ("u", "a", 3.0, 5), ("u", "a", 4.0, 6)]
    manifest, _ = prepared(rows, tmp_path, duplicates="drop")
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.ratings is not None
    assert dataset.ratings.tolist() == [1.0, 2.0, 4.0]
    assert manifest.counts_before["events"] == 4
    assert manifest.statistics["dropped_duplicates"] == 1


@pytest.mark.parametrize("filter_name", ["none", "amazon_five"])
def test_published_is_pandas_sort_of_the_whole_table(tmp_path: Path, filter_name: str) -> None:
    rng = np.random.default_rng(1)
    columns = rng.integers(0, 60, 3000), rng.integers(0, 40, 3000), rng.integers(0, 20, 3000)
    rows: list[Row] = [(f"u{u}", f"i{i}", 1.0, int(t)) for u, i, t in zip(*columns)]
    manifest, sequences = prepared(rows, tmp_path, tie_order="published", filter=filter_name)
    frame = pd.DataFrame(rows, columns=["user", "item", "rating", "time"])
    if filter_name == "amazon_five":  # both counted once, sorted, and only then short users go
        frame = frame[
            (frame.groupby("item")["user"].transform("size") >= 5)
            & (frame.groupby("user")["item"].transform("size") >= 5)
        ]
    grouped = frame.sort_values(by=["time"]).groupby("user")["item"].agg(list)
    expected = {user: items for user, items in grouped.items() if filter_name == "none" or len(items) >= 5}
    assert sequences == expected
    assert manifest.choices["numpy"] == np.__version__
    assert len(manifest.choices["tie_order_hash"]) == 32
    again, _ = prepared(rows, tmp_path, tie_order="published", filter=filter_name)
    assert again == manifest


@pytest.mark.parametrize(
    ("choices", "what"),
    [
        ({"tie_order": "random"}, "--tie_order=random orders events of one time"),
        ({"tie_order": "published"}, "--tie_order=published orders events of one time"),
        ({"duplicates": "drop"}, "these events have no times; --duplicates=consecutive"),
        ({"tie_order": "published", "duplicates": "drop"}, "leave out --duplicates=drop"),
        ({"tie_order": "sideways"}, "unknown --tie_order=sideways; known: file, published, random"),
    ],
)
def test_choices_that_cannot_act_are_refused(tmp_path: Path, choices: dict[str, str], what: str) -> None:
    (tmp_path / "r.txt").write_text("u a\nu a\nu b\n")
    raw = RawRatings("t", [tmp_path / "r.txt"], PAIRS)
    with pytest.raises(UserError, match=what):
        prepare(dataclasses.replace(raw, **choices), tmp_path / "out")
    manifest = prepare(dataclasses.replace(raw, duplicates="consecutive"), tmp_path / "out")
    assert manifest.counts["events"] == 2


def test_ties_are_told_to_the_precision_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("u,b,1500000000002\nu,a,1500000000001\nu,a,1500000000001\n")
    options = ReadOptions("user,item,timestamp", ",", header=False)
    raw = RawRatings("t", [tmp_path / "r.csv"], options)
    found = prepare(raw, tmp_path / "out").statistics
    assert (found["tied_events"], found["duplicates"], found["consecutive_repeats"]) == (1, 1, 1)
