"""Ratings in Parquet: what is accepted, and the row that is named when it is not."""

from __future__ import annotations

import datetime
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pytest

from generative_recommenders.data.readers.ratings_table import (
    RawRatings,
    ReaderFormat,
    read_batches,
    sniff_format,
)
from generative_recommenders.errors import UserError
from ratings_files import error_of, read, write_parquet


def test_parquet(tmp_path: Path) -> None:
    when = [datetime.datetime.fromtimestamp(s, datetime.timezone.utc) for s in (5, 6, 7)]
    path = write_parquet(
        tmp_path,
        {
            "movieId": [3, 1, 2],
            "x": [0, 0, 0],
            "userId": pa.array(["b", "a", "b"]).dictionary_encode(),
            "ts": when,
        },
    )
    layout = sniff_format(path)
    assert layout.columns == ("item", None, "user", "timestamp")
    expected = {"user": ["b", "a", "b"], "item": ["3", "1", "2"], "timestamp": [5, 6, 7]}
    assert read(path, layout) == expected
    assert read(path, ReaderFormat(columns=None)) == expected


def test_columns_that_repeat_the_schema_keep_their_roles(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, {"item": ["I1"], "user": ["U1"], "time": [7], "stars": [5.0]})
    layout = sniff_format(path, ("item", "user", "time", "stars"))
    assert read(path, layout) == {"user": ["U1"], "item": ["I1"], "rating": [5.0], "timestamp": [7]}


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"user": ["a", None, "b"]}, "row 2: the user is missing"),
        ({"user": ["a", "b", ""]}, "row 3: the user is empty"),
        ({"user": [1.0, 2.0, 3.0]}, "ids must be strings or integers"),
        ({"rating": [1.0, 2.0, float("nan")]}, "row 3: the rating is not a finite number"),
        ({"rating": ["1", "b", "c"]}, "row 2: the rating 'b' is not a number"),
        (
            {"rating": [datetime.date(2020, 1, 1)] * 3},
            "column 'rating' has type date32[day]; ratings must be",
        ),
        ({"stars": ["1", "2", "x"]}, "row 3: the rating 'x' (column 'stars') is not a number"),
        ({"timestamp": ["1", "2", "x"]}, "row 3: the timestamp 'x' is not a whole number of seconds"),
        ({"ts": ["1", "2", ""]}, "row 3: the timestamp '' (column 'ts') is not a whole number of seconds"),
        ({"timestamp": [1.0, float("nan"), 2.0]}, "row 2: the timestamp 'nan' is not a whole number"),
        ({"timestamp": [1.0, 2.0, 2.5]}, "row 3: the timestamp '2.5' is not a whole number of seconds"),
        (
            {"timestamp": [datetime.timedelta(1)] * 3},
            "column 'timestamp' has type duration[us]; times must be seconds since 1970, dates or of a timestamp type",
        ),
        ({"timestamp": [datetime.date(1969, 1, 1)] * 3}, "row 1: the timestamp is negative or after"),
        ({"timestamp": [1, -2, 3]}, "row 2: the timestamp is negative or after"),
        ({"timestamp": [1, 2, 1_400_000_000_000]}, "row 3: the timestamp"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict, what: str) -> None:
    path = write_parquet(tmp_path, {"user": ["a", "b", "c"], "item": [1, 2, 3], **columns})
    assert what in error_of(path, ReaderFormat(columns=None))


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, {"user": ["a"], "item": ["b"]})
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable Parquet file, or cut short" in error_of(path, ReaderFormat(columns=None))


def test_parquet_whose_text_is_no_text(tmp_path: Path) -> None:
    """Column names and ids that are not UTF-8."""
    path = write_parquet(tmp_path, {"user": ["a"], "item": ["b"]})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"user", b"u\x95er"))
    assert "not a readable Parquet file" in error_of(path, ReaderFormat(columns=None))
    path.write_bytes(whole.replace(b"user", b"u\ner"))
    assert error_of(path, ReaderFormat(columns=None)).endswith(
        "no user among: u er, item; name the columns with --columns"
    )
    wrong = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path, {"user": wrong, "item": ["b"]})
    assert error_of(path, ReaderFormat(columns=None)) == f"{path}, row 1: the user is not UTF-8 text"


def test_roles_in_the_order_of_the_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, {"who": ["a"], "what": ["b"], "when": [7]})
    layout = sniff_format(path, ("user", "item", "timestamp"))
    assert read(path, layout) == {"user": ["a"], "item": ["b"], "timestamp": [7]}
    with pytest.raises(UserError, match="3 columns where 2 are expected: who, what, when"):
        sniff_format(path, ("user", "item"))
    path = write_parquet(tmp_path, {"item_id": ["b"], "user_id": ["a"]})
    with pytest.raises(
        UserError, match="column 'item_id' is in the place of the user; write --columns=item="
    ):
        sniff_format(path, ("user", "item"))


def test_every_file_is_read_by_its_own_schema(tmp_path: Path) -> None:
    first = write_parquet(tmp_path, {"who": ["a"], "what": ["x"]}, "1.parquet")
    second = write_parquet(tmp_path, {"what": ["y"], "who": ["b"]}, "2.parquet")
    layout = sniff_format(first, ("who", "what"))
    tables = list(read_batches(RawRatings("t", [first, second], layout)))
    assert [table.to_pylist() for table in tables] == [
        [{"user": "a", "item": "x"}],
        [{"user": "b", "item": "y"}],
    ]
    write_parquet(tmp_path, {"what": ["y"], "whom": ["b"]}, "2.parquet")
    assert error_of(second, layout) == (
        f"{second}: `what, whom` are not the columns of the first file, `who, what`; all files must have the same"
    )


def test_views_of_text_and_dates(tmp_path: Path) -> None:
    columns = {
        "user": pa.array(["a", "b"], pa.string_view()),
        "item": pa.array(["x", "y"]).dictionary_encode(),
        "rating": pa.array(["1.5", "2"], pa.string_view()),
        "timestamp": [datetime.date(1970, 1, 2), datetime.date(2020, 1, 1)],
    }
    expected = {
        "user": ["a", "b"],
        "item": ["x", "y"],
        "rating": [1.5, 2.0],
        "timestamp": [86_400, 1_577_836_800],
    }
    assert read(write_parquet(tmp_path, columns), ReaderFormat(columns=None)) == expected
    columns["timestamp"] = pa.array([86_400_000, 1_577_836_800_000], pa.date64())
    assert read(write_parquet(tmp_path, columns), ReaderFormat(columns=None)) == expected
    columns["timestamp"] = pa.array(["5", "noon"], pa.string_view())
    path = write_parquet(tmp_path, columns)
    assert "row 2: the timestamp 'noon' is not a whole" in error_of(path, ReaderFormat(columns=None))


def test_gzipped_parquet_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "r.parquet.gz"
    packed.write_bytes(gzip.compress(write_parquet(tmp_path, {"user": ["a"], "item": ["b"]}).read_bytes()))
    assert error_of(packed) == f"{packed}: gzipped Parquet: unpack it first"


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, {"user": ["a"], "item": ["b"]})
    path = path.rename(tmp_path / os.fsdecode(b"r\xff.parquet"))
    assert "the name of a Parquet file must be UTF-8; rename it" in error_of(path, ReaderFormat(columns=None))
