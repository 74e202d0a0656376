"""Preparation on Spark: the same folder as by the default engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.preparation.spark import prepare_with_spark
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from ratings_files import COMMAS, Row, write_csv

MASTER = "local[2]"


def test_missing_pyspark_reports_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyspark.sql", None)
    (tmp_path / "r.csv").write_text("u,i\n")
    raw = RawRatings("t", [tmp_path / "r.csv"], ReadOptions("user,item", ",", header=False))
    with pytest.raises(UserError, match=r"pyspark is not installed; the extra 'spark' has it"):
        prepare_with_spark(raw, tmp_path / "out", MASTER)


def assert_same(raw: RawRatings, tmp_path: Path) -> None:
    one = prepare(raw, tmp_path / "one")
    two = prepare_with_spark(raw, tmp_path / "two", MASTER)
    assert one == two
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        first, second = tmp_path / "one" / name, tmp_path / "two" / name
        if name.endswith(".parquet"):
            assert pq.read_table(first).equals(pq.read_table(second))
        else:
            assert first.read_bytes() == second.read_bytes()


def table(seed: int, count: int) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    names = ["a", "b,c", 'q"q', "ünï", "漢字", "\U0001f600", " s p ", "z"] + [f"n{i}" for i in range(40)]
    return {
        "user": [names[i] for i in rng.integers(0, len(names), count)],
        "item": [names[i] for i in rng.zipf(1.4, count) % len(names)],
        "rating": (rng.integers(1, 11, count) / 2).tolist(),
        "timestamp": (rng.integers(0, 9, count) * 86_400).tolist(),
    }


def rows(seed: int, count: int) -> list[Row]:
    return list(zip(*table(seed, count).values()))


@pytest.mark.parametrize(
    "filter_name",
    [
        "amazon_five",
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("k_core:12", marks=pytest.mark.slow),
    ],
)
def test_csv(tmp_path: Path, filter_name: str) -> None:
    pytest.importorskip("pyspark")
    header = tuple(table(0, 0))
    plain = write_csv(tmp_path / "1.csv", [header, *rows(1, 700)], bom=True)
    zipped = write_csv(tmp_path / "2.csv.gz", [header, *rows(2, 300)], "\r\n", zipped=True)
    assert_same(RawRatings("t", [plain, zipped], ReadOptions(delimiter=","), filter_name), tmp_path)


def test_text_and_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    text, parquet = tmp_path / "r.txt", tmp_path / "r.parquet"
    text.write_text("2 x\n10 y\n2 z\n\n10  x\n2 x\n")
    assert_same(RawRatings("t", [text], ReadOptions("user,item", " ", header=False)), tmp_path)
    columns = table(3, 500)
    pq.write_table(pa.table({**columns, "item": pa.array(range(500))}), parquet, row_group_size=100)
    assert_same(RawRatings("t", [parquet], ReadOptions()), tmp_path)


def test_a_line_like_the_header_is_a_rating(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    files = [tmp_path / f"{number}.csv" for number in range(3)]
    files[0].write_text("\ufeffuser,item\na,b\nuser,item\n", encoding="utf-8")
    files[1].write_text("\n \r\nuser,item\nuser,item\n")
    files[2].write_text("user,item\n" + ("a" * 1000 + ",b\nuser,item\n") * 10_000)  # two blocks
    raw = RawRatings("t", files, ReadOptions("user,item", ",", header=True))
    assert_same(raw, tmp_path)
    assert SequenceDataset.open(tmp_path / "one").num_events == 2 + 1 + 20_000


@pytest.mark.parametrize(
    ("times", "good"),
    [
        (pa.array([1.5, 2.0]), True),
        pytest.param(pa.array([1.0, 2.0]), True, marks=pytest.mark.slow),
        pytest.param(pa.array([1, 20_000], pa.date32()), True, marks=pytest.mark.slow),
        pytest.param(pa.array(["12", "-1.5"]), False, marks=pytest.mark.slow),
        pytest.param(pa.array(["12", "13"]), True, marks=pytest.mark.slow),
        (pa.array([1500, 2700], pa.timestamp("ms")), True),
        pytest.param(pa.array([1500, 2700], pa.timestamp("us", "UTC")), True, marks=pytest.mark.slow),
    ],
)
def test_times_of_parquet(tmp_path: Path, times: pa.Array, good: bool) -> None:
    pytest.importorskip("pyspark")
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"user": ["a", "a"], "item": ["x", "y"], "timestamp": times}), path)
    raw = RawRatings("t", [path], ReadOptions())
    if good:
        return assert_same(raw, tmp_path)
    said = []
    for engine in (prepare, lambda *args: prepare_with_spark(*args, MASTER)):
        with pytest.raises(UserError) as refused:
            engine(raw, tmp_path / "out")
        said.append(str(refused.value))
    assert said[0] == said[1]
    return None


def test_bad_input_names_the_line(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    path = tmp_path / "r.csv"
    path.write_text("u,i,1,2\nu,i,1,2\nu,i,x,2\n")
    with pytest.raises(UserError, match="line 3: the rating 'x' is not a number"):
        prepare_with_spark(RawRatings("t", [path], COMMAS), tmp_path / "out", MASTER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rest", [True, False])
def test_events_without_an_id_are_counted_over_all_files(
    tmp_path: Path, rest: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyspark")
    paths = [tmp_path / f"{number}.csv" for number in range(3)]
    paths[0].write_text("user,item\n,i\n" + "u,j\nv,i\n" * rest)
    paths[1].write_text("user,item\nu,\n,\n")
    paths[2].write_text("user,item\n" + "u,k\n" * rest + "v,\n")
    raw = RawRatings("t", paths, ReadOptions(drop_missing=True))
    if rest:
        assert_same(raw, tmp_path)
    else:
        for engine in (prepare, lambda *args: prepare_with_spark(*args, MASTER)):
            with pytest.raises(UserError, match="every event lacks a user or an item"):
                engine(raw, tmp_path / "out")
    assert caplog.text.count("4 events without a user or an item are left out") == 2


def test_bad_parquet_names_the_row(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"user": ["u", "u"], "item": ["i", "j"], "timestamp": [1.0, -1.5]}), path)
    with pytest.raises(UserError, match="row 2: the timestamp '-1.5' is before 1970"):
        prepare_with_spark(RawRatings("t", [path], ReadOptions()), tmp_path / "out", MASTER)


@pytest.mark.slow
def test_further_columns_of_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    rng = np.random.default_rng(3)
    columns = table(5, 2000)
    columns["genre"] = [None if i == 3 else f"é{i}" for i in rng.integers(0, 9, 2000)]
    columns["progress"] = [None if x < 0.1 else x for x in rng.random(2000)]
    columns["seen_at"] = [None if x % 7 == 0 else int(x) for x in rng.integers(10**9, 2 * 10**9, 2000)]
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns), path)
    names = "user,item,rating,timestamp,genre:categorical,progress:numerical,seen_at:time"
    assert_same(RawRatings("t", [path], ReadOptions(names), filter="k_core:3"), tmp_path)


def test_columns_whose_names_differ_in_case_alone(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    path = tmp_path / "r.csv"
    path.write_text("user,item,timestamp,User,none\na,b,1,x,\na,c,2,,\nB,c,2,y,\n")
    columns = "user,item,timestamp,User:categorical,none:categorical"
    assert_same(RawRatings("t", [path], ReadOptions(columns)), tmp_path)


@pytest.mark.parametrize(
    ("tie_order", "duplicates"),
    [
        ("random", "consecutive"),
        pytest.param("random", "drop", marks=pytest.mark.slow),
        pytest.param("random", "keep", marks=pytest.mark.slow),
        pytest.param("file", "drop", marks=pytest.mark.slow),
        pytest.param("file", "consecutive", marks=pytest.mark.slow),
    ],
)
def test_tie_order_and_duplicates(tmp_path: Path, tie_order: str, duplicates: str) -> None:
    pytest.importorskip("pyspark")
    files = [write_csv(tmp_path / f"{number}.csv", rows(number, 600)) for number in range(2)]
    raw = RawRatings("t", files, COMMAS, "k_core:3", tie_order=tie_order, duplicates=duplicates)
    assert_same(raw, tmp_path)


def test_the_published_order_is_of_this_machine_alone(tmp_path: Path) -> None:
    raw = RawRatings("t", [tmp_path / "r.csv"], COMMAS, tie_order="published")
    with pytest.raises(UserError, match="--tie_order=published is pandas' order on this machine alone"):
        prepare_with_spark(raw, tmp_path / "out", MASTER)
