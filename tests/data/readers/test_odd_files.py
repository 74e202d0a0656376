"""Odd files of events that databases and spreadsheets write: read in full or refused, never read in part."""

from __future__ import annotations

import csv
import io
import json
import logging
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative_recommenders.data.readers import text
from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.data.readers.files import data_files
from generative_recommenders.errors import UserError
from ratings_files import error_of, read, write, write_parquet


@pytest.mark.parametrize("mark", ["NA", "NaN", "null", "None", " NA"])
def test_a_missing_rating_is_no_header(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path, f"1,2,{mark}\n2,2,5\n")
    assert "line 1: the rating" in error_of(path, ReadOptions("user,item,rating"))
    assert read(path, ReadOptions("user,item,x:numerical"))["user"] == ["1", "2"]


def test_decimal_times_keep_their_fractions_and_decimal_integers_are_ids(tmp_path: Path) -> None:
    times = pa.array([Decimal("1600000000.900"), Decimal("1600000000.100")], pa.decimal128(20, 3))
    user = pa.array([Decimal(10**30), Decimal(7)], pa.decimal128(38, 0))
    events = read(write_parquet(tmp_path, {"user": user, "item": ["i", "j"], "timestamp": times}), ReadOptions())
    assert events["timestamp"] == [1600000000.9, 1600000000.1]
    assert events["user"] == [str(10**30), "7"]


def test_blanks_are_no_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\n ,2\n NA,3\n u,4\n")
    assert "2 events in all lack a user or an item" in error_of(path, ReadOptions())
    assert read(path, ReadOptions(drop_missing=True)) == {"user": [" u"], "item": ["4"]}


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("user,item,time\n1,2,2020-01-01\n", "its times are no numbers: leave --time_unit=ms out"),
        ("user,item\n1,2\n", "no times are read: leave --time_unit=ms out"),
    ],
)
def test_a_unit_of_times_that_has_no_effect(tmp_path: Path, lines: str, what: str) -> None:
    assert what in error_of(write(tmp_path, lines), ReadOptions(time_unit="ms"))


@pytest.mark.parametrize(("name", "mark"), [("bzip2", b"BZh91AY"), ("xz", b"\xfd7zXZ\x00\x00")])
def test_other_packers_are_named(tmp_path: Path, name: str, mark: bytes) -> None:
    assert f"packed by {name}; unpack it" in error_of(write(tmp_path, mark + bytes(9)), ReadOptions())


def test_a_file_and_its_packed_copy_are_one(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("ratings.csv", "ratings.csv.gz", "more.csv")]
    with pytest.raises(UserError, match=r"ratings.csv and ratings.csv.gz hold the same events"):
        data_files(tmp_path, files)
    assert data_files(tmp_path, files[1:]) == [files[2], files[1]]


@pytest.mark.parametrize("empty", [0, 1, 2])
@pytest.mark.parametrize("kind", ["csv", "header", "parquet"])
def test_empty_parts_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, empty: int) -> None:
    files = [tmp_path / f"part-{number}" for number in range(3)]
    for number, path in enumerate(files):
        rows = [] if number == empty else [f"u{number}"]
        if kind == "parquet":
            pq.write_table(pa.table({"user": pa.array(rows, pa.string()), "item": pa.array(rows, pa.string())}), path)
        else:
            path.write_text("user,item\n" * (bool(rows) or kind == "header") + "".join(f"{u},{u}\n" for u in rows))
    with caplog.at_level(logging.WARNING, logger="absl"):
        events = pa.concat_tables(EventReader(files, ReadOptions()).batches())
    assert events["user"].to_pylist() == [f"u{number}" for number in range(3) if number != empty]
    assert f"part-{empty}: the file is empty" in caplog.text
    with pytest.raises(UserError, match="the file is empty"):
        list(EventReader([files[empty]], ReadOptions()).batches())


def test_a_json_key_that_comes_late_is_told(tmp_path: Path) -> None:
    late = json.dumps({"user": "u", "item": "i"}) + "\n"
    path = write(tmp_path, late * 120 + '{"user": "u", "item": "i", "timestamp": 5}\n', "a.jsonl")
    assert "line 121: the key 'timestamp', which none of the first 100 lines has" in error_of(path, ReadOptions())
    assert len(read(path, ReadOptions("user,item"))["user"]) == 121


def test_lists_of_times_are_told_as_lists(tmp_path: Path) -> None:
    sessions = {"user": ["u", "v"], "item": [[1, 2], [3, 4]], "timestamp": [[10, 20], [15, 30]]}
    found = error_of(write_parquet(tmp_path, sessions), ReadOptions())
    assert "column 'timestamp' is of type" in found and "list" in found
    path = write(tmp_path, json.dumps({"user": "u", "item": [1, 2], "timestamp": [10, 20]}) + "\n", "a.jsonl")
    assert "'timestamp' is an object or list" in error_of(path, ReadOptions())


def test_json_values_of_mixed_kinds(tmp_path: Path) -> None:
    rows = [{"user": "u", "item": item, "x": x} for item, x in (("a", []), (3, {}), ("[b", True), ("d", 1))]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    assert read(path, ReadOptions())["item"] == ["a", "3", "[b", "d"]
    assert "'x' is an object or list" in error_of(path, ReadOptions("user,item,x:categorical"))
    rows = [{"user": "u", "item": "i"}] * 100 + [{"user": {"id": 1}, "item": "i"}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    assert "line 101: the user '{\"id\": 1}' is an object or list" in error_of(path, ReadOptions())


@pytest.mark.parametrize("text", [r"a\ud83d", r"\ud83db"])
def test_json_text_without_a_value_is_refused(tmp_path: Path, text: str) -> None:
    """Polars makes a NUL of half a surrogate pair, so that different users would become one."""
    user = '{"user": "%s", "item": "i"}\n'
    path = write(tmp_path, user % r"a\u0000b" + user % text, "a.jsonl")
    assert "line 2: the user" in error_of(path, ReadOptions()) and "half a surrogate" in error_of(path, ReadOptions())
    whole = write(tmp_path, user % r"a\u0000b" + user % r"\ud83d\ude00", "b.jsonl")
    assert read(whole, ReadOptions())["user"] == ["a\0b", "\U0001f600"]


def test_marks_of_inches_in_a_file_with_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a line or so: a mark that opens no field is text, and no block ends inside a quoted line end."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 40)
    titles = ['12" vinyl', '"a, ""b""\nc"', "plain", '5" or 6"', '"x\ny"']
    path = write(tmp_path, "user,item,title\n" + "".join(f"u{n},i,{titles[n % 5]}\n" for n in range(50)))
    expected = [row[0] for row in csv.reader(io.StringIO(path.read_text()))][1:]
    assert read(path, ReadOptions("user,item,_"))["user"] == expected == [f"u{n}" for n in range(50)]


@pytest.mark.parametrize("before", ["", 'u,i,12" vinyl\n', 'u,"i",a\n'])
def test_a_quote_that_is_never_closed(tmp_path: Path, before: str) -> None:
    """The rows behind it would be one long title."""
    path = write(tmp_path, f'user,item,title\n{before}u,i,"a\nv,j,b\n')
    line = 3 if before else 2
    assert f"line {line}: a quote is not closed; --quoting=none" in error_of(path, ReadOptions("user,item,_"))
    assert read(path, ReadOptions("user,item,_", quoting="none"))["item"][-1] == "j"


@given(st.text(alphabet='a",\n', max_size=40))
def test_rows_end_where_the_csv_module_ends_them(data: str) -> None:
    reader = csv.reader(io.StringIO(data + "x", newline="\n"))
    ends = np.flatnonzero(np.frombuffer(data.encode(), np.uint8) == ord("\n"))
    expected = ends[np.array([reader.line_num for _ in reader][:-1], int) - 1].tolist()
    assert text._row_ends(data.encode(), ",").tolist() == expected
