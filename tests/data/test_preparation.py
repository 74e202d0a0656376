"""Preparation against a slow reference, and what it leaves on disk."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.export import export_parquet
from generative_recommenders.data.feature_tables import align
from generative_recommenders.data.preparation import prepare as preparation
from generative_recommenders.data.preparation.digests import EventDigests
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.schema import KNOWN_KINDS
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from ratings_files import COMMAS, Row, prepare_rows, write_csv

MASK = (1 << 64) - 1


def reference_filter(rows: list[Row], name: str) -> tuple[list[Row], set[str]]:
    """The rows and the catalogue that a filter keeps, by plain counting."""
    if name == "none":
        return rows, {row[1] for row in rows}
    if name == "amazon_five":
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        rows = [row for row in rows if users[row[0]] >= 5 and items[row[1]] >= 5]
        catalogue = {row[1] for row in rows}
        users = Counter(row[0] for row in rows)
        return [row for row in rows if users[row[0]] >= 5], catalogue
    least = int(name.removeprefix("k_core:"))
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
        if len(kept) == len(rows):
            return rows, {row[1] for row in rows}
        rows = kept


def reference_sequences(rows: list[Row]) -> dict[str, list[Row]]:
    """Each user's rows, oldest first; ``sorted`` keeps ties in input order."""
    sequences: dict[str, list[Row]] = {}
    for row in rows:
        sequences.setdefault(row[0], []).append(row)
    return {user: sorted(sequences[user], key=lambda row: row[3]) for user in sorted(sequences, key=str.encode)}


def reference_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_fnv(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def reference_hash(sequences: dict[str, list[Row]]) -> str:
    total = 0
    for rows in sequences.values():
        for position, (user, item, rating, time) in enumerate(rows):
            bits = int(np.float32(rating).view(np.uint32))
            words = []
            for seed in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
                state = reference_fnv(user) ^ seed
                for word in (reference_fnv(item), bits, time, position):
                    state = (reference_mix(state) + word) & MASK
                words.append(reference_mix(state))
            total += (words[0] << 64) + words[1]
    return f"{total % (1 << 128):032x}"


def assert_matches(folder: Path, rows: list[Row], filter_name: str) -> None:
    kept, catalogue = reference_filter(rows, filter_name)
    sequences = reference_sequences(kept)
    dataset = SequenceDataset.open(folder)
    items = sorted(catalogue, key=str.encode)
    assert dataset.original_user_ids().to_pylist() == list(sequences)
    assert dataset.original_item_ids().to_pylist() == items
    flat = [row for sequence in sequences.values() for row in sequence]
    assert [items[i - 1] for i in dataset.items] == [row[1] for row in flat]
    np.testing.assert_array_equal(dataset.ratings, np.array([row[2] for row in flat], np.float32))
    assert dataset.timestamps is not None
    assert dataset.timestamps.tolist() == [row[3] for row in flat]
    assert dataset.lengths.tolist() == [len(sequence) for sequence in sequences.values()]
    assert dataset.manifest.data_hash == reference_hash(sequences)
    assert dataset.manifest.counts_before["events"] == len(rows)
    dataset.verify()


ODD_IDS = [
    "a",
    "b,c",
    'd"e',
    " f g ",
    "ünï",
    "漢字",
    "\U0001f600",
    "z",
    "10",
    "9",
    "0010",
    "\uffff",
    "#x",
    "Null",
]
row_strategy = st.tuples(
    st.sampled_from(ODD_IDS),
    st.sampled_from(ODD_IDS),
    st.sampled_from([0.5, 1.0, 3.0, 4.5, 5.0, -1.0]),
    st.integers(0, 6).map(lambda day: day * 86_400),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(row_strategy, min_size=1, max_size=60),
    filter_name=st.sampled_from(["none", "k_core:2", "k_core:3", "amazon_five"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    zipped=st.booleans(),
    memory_limit=st.sampled_from([1, 700, preparation.DEFAULT_MEMORY_LIMIT]),
)
def test_equals_the_reference(rows, filter_name, line_end, bom, zipped, memory_limit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_csv(Path(folder) / "r.csv", rows, line_end, bom, zipped)
        raw = RawRatings("t", [path], COMMAS, filter_name)
        out = Path(folder) / "out"
        if not reference_filter(rows, filter_name)[0]:
            with pytest.raises(UserError, match="no rating is left after the filter"):
                prepare(raw, out, memory_limit)
            assert not out.exists()
            return
        prepare(raw, out, memory_limit)
        assert_matches(out, rows, filter_name)
        assert sorted(p.name for p in out.iterdir()) == sorted(EXPECTED_FILES)


EXPECTED_FILES = [
    "items.int32.bin",
    "items.parquet",
    "manifest.json",
    "offsets.int64.bin",
    "ratings.float32.bin",
    "timestamps.int64.bin",
    "users.parquet",
]


def random_rows(seed: int, count: int, users: int, items: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    columns = (
        rng.integers(0, users, count),
        rng.zipf(1.5, count) % items,
        rng.integers(1, 6, count),
        rng.integers(0, 50, count),
    )
    return [(f"u{u}", f"i{i}", float(r), int(t) * 86_400) for u, i, r, t in zip(*columns)]


@pytest.mark.parametrize("filter_name", ["none", "amazon_five", "k_core:5"])
def test_larger_table_in_and_out_of_memory(tmp_path: Path, filter_name: str) -> None:
    rows = random_rows(3, 6_000, 400, 200)
    path = write_csv(tmp_path / "r.csv", rows)
    raw = RawRatings("t", [path], COMMAS, filter_name)
    inside = prepare(raw, tmp_path / "inside")
    outside = prepare(raw, tmp_path / "outside", memory_limit=20_000)
    assert_matches(tmp_path / "inside", rows, filter_name)
    assert_matches(tmp_path / "outside", rows, filter_name)
    assert inside == outside


def test_amazon_rule_fixes_the_catalogue_before_it_drops_short_users(tmp_path: Path) -> None:
    """Users p0..p4 keep five items; q loses one rating to the rare item and is dropped, its other items
    stay counted."""
    rows: list[Row] = [(f"p{u}", f"i{i}", 5.0, i) for u in range(5) for i in range(5)]
    rows += [("q", f"i{i}", 1.0, i) for i in range(4)] + [("q", "rare", 1.0, 9)]
    rows += [(f"s{u}", "late", 2.0, 1) for u in range(5)] + [
        (f"s{u}", f"x{u}{i}", 2.0, 1) for u in range(5) for i in range(4)
    ]
    manifest = prepare_rows(rows, tmp_path, filter="amazon_five")
    assert manifest.counts["users"] == 5
    assert SequenceDataset.open(tmp_path / "out").original_item_ids().to_pylist() == [
        "i0",
        "i1",
        "i2",
        "i3",
        "i4",
        "late",
    ]


def test_several_files_are_read_in_order_and_ties_keep_it(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "1.csv", [("u", "b", 1.0, 5), ("u", "a", 1.0, 5)])
    second = write_csv(tmp_path / "2.csv", [("u", "c", 1.0, 5), ("u", "d", 1.0, 4), ("u", "b", 1.0, 5)], zipped=True)
    prepare(RawRatings("t", [first, second], COMMAS), tmp_path / "out")
    dataset = SequenceDataset.open(tmp_path / "out")
    ids = dataset.original_item_ids().to_pylist()
    assert [ids[i - 1] for i in dataset.items] == ["d", "b", "a", "c", "b"]


def test_without_ratings_and_times_the_file_order_is_the_order(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("u2 x\nu1 y\nu1 x\nu2 y\nu1 y\n")
    manifest = prepare(RawRatings("t", [path], ReadOptions("user,item", " ", header=False)), tmp_path / "out")
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.ratings is None
    assert dataset.timestamps is None
    assert dataset.items.tolist() == [2, 1, 2, 1, 2]
    assert manifest.lengths == {"min": 2, "median": 2.5, "mean": 2.5, "max": 3}
    dataset.verify()


def test_users_with_one_event_stay_and_are_counted(tmp_path: Path) -> None:
    manifest = prepare_rows([("u", "a", 1.0, 1), ("v", "a", 1.0, 1), ("v", "a", 1.0, 1)], tmp_path)
    assert manifest.counts == {"users": 2, "items": 1, "events": 3, "users_with_one_event": 1}
    assert "users with one event (they train only): 1" in summary(manifest)


def test_features_are_lined_up_and_described(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_csv(tmp_path / "r.csv", [("u", "c", 1.0, 1), ("u", "a", 1.0, 2), ("v", "b", 1.0, 1)])
    features = pa.table(
        {
            "item": ["b", "a", "unused"],
            "title": ["B", "A", "U"],
            "genres": [["x", "y"], ["x"], ["w"]],
            "price": [1.5, 2.5, 9.0],
        }
    )
    users = pa.table({"user": ["v", "u"], "age": pa.array([30, None], pa.int64())})
    raw = RawRatings("t", [path], COMMAS, item_features=features, user_features=users)
    prepare(raw, tmp_path / "out")
    dataset = SequenceDataset.open(tmp_path / "out")
    table = dataset.item_features()
    assert table is not None
    assert table.to_pydict() == {
        "title": ["A", "B", None],
        "genres": [["x"], ["x", "y"], None],
        "price": [2.5, 1.5, None],
    }
    described = {spec.name: (spec.kind, spec.cardinality, spec.owner) for spec in dataset.manifest.features}
    assert described == {
        "title": ("categorical", 2, "item"),
        "genres": ("categorical_list", 2, "item"),
        "price": ("numerical", 0, "item"),
        "age": ("numerical", 0, "user"),
    }
    user_table = dataset.user_features()
    assert user_table is not None
    assert user_table["age"].to_pylist() == [None, 30]


@pytest.mark.parametrize("name", ["k_core", "k_core:0", "k_core:-1", "k_core:x", "five", "none:1", "k_core:²"])
def test_unknown_filters_list_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unknown filter .*amazon_five"):
        prepare(RawRatings("t", [tmp_path / "r.csv"], filter=name), tmp_path / "out")


def test_the_hash_does_not_depend_on_the_order_of_users_but_on_everything_else() -> None:
    def digest(users, items, ratings, times, positions) -> str:
        texts = {"user": pa.array(users, pa.large_string()), "item": pa.array(items, pa.large_string())}
        digests = EventDigests(texts, KNOWN_KINDS)
        every = np.arange(len(users))
        columns = {"item": every + 1, "rating": np.array(ratings, np.float32), "timestamp": np.array(times)}
        digests.add(every, np.array(positions), columns)
        return digests.hashes()[0]

    base = digest(["u", "u", "v"], ["a", "b", "a"], [1, 2, 3], [5, 6, 7], [0, 1, 0])
    assert digest(["v", "u", "u"], ["a", "a", "b"], [3, 1, 2], [7, 5, 6], [0, 0, 1]) == base
    changes = [
        digest(["u", "u", "w"], ["a", "b", "a"], [1, 2, 3], [5, 6, 7], [0, 1, 0]),
        digest(["u", "u", "v"], ["a", "b", "b"], [1, 2, 3], [5, 6, 7], [0, 1, 0]),
        digest(["u", "u", "v"], ["a", "b", "a"], [1, 2, 4], [5, 6, 7], [0, 1, 0]),
        digest(["u", "u", "v"], ["a", "b", "a"], [1, 2, 3], [5, 6, 8], [0, 1, 0]),
        digest(["u", "u", "v"], ["a", "b", "a"], [1, 2, 3], [5, 6, 7], [1, 0, 0]),
    ]
    assert len({base, *changes}) == 6


@pytest.mark.parametrize("columns", [("user", "item"), ("user", "item", "rating", "timestamp")])
def test_parquet_out_and_in_again_is_the_same_data(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = write_csv(tmp_path / "r.csv", [*random_rows(4, 300, 30, 20), ("ü,1", "漢", 1.0, 3)])
    names = ",".join(name if name in columns else "_" for name in ("user", "item", "rating", "timestamp"))
    options = ReadOptions(names, ",", header=False)
    first = prepare(RawRatings("t", [path], options), tmp_path / "out")
    export_parquet(SequenceDataset.open(tmp_path / "out"), tmp_path / "e" / "r.parquet")
    second = prepare(RawRatings("t", [tmp_path / "e" / "r.parquet"], ReadOptions()), tmp_path / "again")
    assert second == first
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["r.parquet"]


def test_titles_are_kept_but_are_no_feature_to_learn_from(tmp_path: Path) -> None:
    field = pa.field("title", pa.string(), metadata={b"kind": b"text"})
    titles = pa.table({"item": ["a", "b"], "title": ["One", "Two"]}, schema=pa.schema([("item", pa.string()), field]))
    table, specs = align("item", pa.array(["a", "b"], pa.large_string()), titles)
    assert [(spec.name, spec.kind, spec.cardinality) for spec in specs] == [("title", "text", 0)]
    assert table["title"].to_pylist() == ["One", "Two"]
