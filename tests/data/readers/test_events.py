"""Raw files of the kinds that people have: what is read, what is refused, and in which words."""

from __future__ import annotations

import gzip
import logging
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

import ratings_files
from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.errors import UserError
from ratings_files import error_of, write


def read(path: Path, columns: str | None = None, **options: Any) -> dict[str, list]:
    """The events of one file as lists by column, times in seconds."""
    return ratings_files.read(path, ReadOptions(columns, **options))


def refused(path: Path, columns: str | None = None, **options: Any) -> str:
    return error_of(path, ReadOptions(columns, **options))


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("header.csv", "user_id,item_id,datetime\nu,b,1600000300\nu,a,1600000100\n", None, [1600000300, 1600000100]),
        ("ms.csv", "user_id,parent_asin,rating,timestamp\nA,B,5.0,1588687728923\n", None, [1588687728.923]),
        ("us.csv", "user,item,time\nA,B,1588687728923456\n", None, [1588687728.923456]),
        ("ns.csv", "user,item,time\nA,B,1588687728923456789\n", None, [1588687728.923456789]),
        ("fraction.csv", "user,item,time\nA,B,1600000000.5\n", None, [1600000000.5]),
        ("iso.tsv", "0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22\n", "user,timestamp,_,_,item", [1287532527]),
        ("zone.csv", "user,item,time\nA,B,2010-10-19T23:55:27+02:00\n", None, [1287525327]),
        ("utc.csv", "user,item,time\nA,B,2010-10-19 23:55:27.5 UTC\n", None, [1287532527.5]),
        ("date.csv", "customer_id,article_id,date\nA,B,2010-10-19\n", None, [1287446400]),
        ("compact.csv", "user,item,date\nA,B,20101019\n", None, [1287446400]),
        ("compact_float.csv", "user,item,date\nA,B,20101019.0\n", None, [1287446400]),
        ("compact.jsonl", '{"user": 1, "item": 2, "date": 20101019}\n', None, [1287446400]),
        ("seconds.csv", "user,item,time\nA,B,20101019\nA,C,20101399\n", None, [20101019, 20101399]),
        ("seven.csv", "user,item,time\nA,B,1970111\n", None, [1970111]),
        ("blanks.txt", "1  17   1502254774\n1 29 1502251833\n", "user,item,timestamp", [1502254774, 1502251833]),
        ("colons.dat", "1::17::4::978300760\n", "user,item,rating,timestamp", [978300760]),
        ("atomic.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t8.9e8\n", None, [890000000]),
        ("goodreads.csv", "user_id,book_id,date_added\n1,2,Tue Sep 26 09:43:46 -0700 2017\n", None, [1506444226]),
        ("reviews.jsonl", '{"user_id": "A", "asin": 7, "timestamp": 1588687728923, "x": [1]}\n', None,
        [1588687728.923]),
    ],
)  # fmt: skip
def test_times_of_many_forms(tmp_path: Path, name: str, text: str, columns: str | None, expected: list[float]) -> None:
    assert read(write(tmp_path, text, name), columns)["timestamp"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_datetime_columns_of_any_precision(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([1_600_000_000 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]], pa.timestamp(unit))
    pa.parquet.write_table(pa.table({"user": ["u"], "item": ["i"], "timestamp": times}), path)
    assert read(path)["timestamp"] == [1_600_000_000]


def test_arrow_and_packed_files_hold_the_same_events(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": ["u", "v"], "item": [1, 2], "rating": [4.0, 3.5], "timestamp": [5, 6]})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_ipc(tmp_path / "a.arrow")
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ndjson(tmp_path / "a.jsonl")
    plain = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.csv.zst").write_bytes(pa.compress(plain, "zstd", asbytes=True))
    expected = read(tmp_path / "a.csv")
    assert expected["item"] == ["1", "2"] and expected["rating"] == [4.0, 3.5]
    for name in ("a.arrow", "a.parquet", "a.jsonl", "a.csv.gz", "a.csv.zst"):
        assert read(tmp_path / name) == expected, name


@pytest.mark.parametrize("option", [{"delimiter": ","}, {"header": True}, {"quoting": "none"}])
def test_options_of_text_are_refused_for_other_files(tmp_path: Path, option: dict[str, Any]) -> None:
    lines = write(tmp_path, '{"user": "u", "item": "i"}\n', "a.jsonl")
    (name,) = option
    assert f"--{name} is for delimited text, and this is json" in refused(lines, **option)


def test_no_header_is_refused_and_the_fields_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path, "11,2014-04-07T10:51:09.277Z,214536502,0\n", "a.dat")
    message = refused(path)
    assert "--columns" in message and "3: '214536502'" in message
    assert read(path, "user,timestamp,item,_")["item"] == ["214536502"]


def test_quotes(tmp_path: Path) -> None:
    csv = write(tmp_path, 'user,item,title\nu,"x, ""y""","two\nlines"\nv,z,t\n')
    assert read(csv)["item"] == ['x, "y"', "z"]
    tsv = write(tmp_path, 'u\t1241100000\tm1\t"Weird Al" Yankovic\nu\t1241100100\tm2\tOther\n', "a.tsv")
    assert read(tsv, "user,timestamp,item,_")["item"] == ["m1", "m2"]
    text = write(tmp_path, 'user,item\nu,"Heroes"\nu,Heroes\n', "b.csv")
    assert read(text, quoting="none")["item"] == ['"Heroes"', "Heroes"]
    assert read(text)["item"] == ["Heroes", "Heroes"]
    quoted = write(tmp_path, 'user\titem\nu\t"two\ttabs"\n', "c.tsv")
    assert read(quoted, quoting="csv")["item"] == ["two\ttabs"]
    with pytest.raises(UserError, match="--quoting=csv needs a delimiter of one character"):
        read(quoted, delimiter="::", quoting="csv")


def test_missing_ids_are_refused_with_their_number_or_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "userId;itemId;time\nNA;i1;5\n7;i2;9\n;i3;3\n")
    message = refused(path)
    assert "line 2" in message and "2 events" in message and "--drop_missing" in message
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert read(path, drop_missing=True)["user"] == ["7"]
    assert "2 events" in caplog.text


@pytest.mark.parametrize("row", [",,,", "  ,i1,,", ",i1,noon,", "u,,5,much"])
def test_nothing_else_of_a_row_without_a_user_or_an_item_is_a_fault(row: str, tmp_path: Path) -> None:
    lines = ["user,item,timestamp,price", "u,i1,1,2", row, "u,i2,3,4"]
    path = write(tmp_path, "\n".join(lines))
    columns = "user,item,timestamp,price:numerical"
    assert re.search("line 3: the (user|item) .*is missing, and 1 events", refused(path, columns))
    assert read(path, columns, drop_missing=True)["price"] == [2, 4]
    path = write(tmp_path, "\n".join([*lines, "u,i3,noon,6"]))  # places are still those of the file
    assert "line 5: the timestamp 'noon'" in refused(path, columns, drop_missing=True)


def test_nothing_left_after_dropping_reports_one_line_error(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\nNA,i\n,j\n")
    assert "nothing is left" in refused(path, drop_missing=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("user,item,when\nu,i,2014-04-07\n", "'when' may be the time"),
        ("user,item,t\nu,i,1600000000\n", "'t' may be the time"),
        ("user,item,t\nu,i,20101019\n", "'t' may be the time"),
        ("user,item,time,date\nu,i,5,2014-04-07\n", "may each be the timestamp"),
    ],
)
def test_a_possible_time_is_never_left_out_in_silence(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    assert named in refused(path)
    assert "timestamp" not in read(path, "user,item")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, "user,item,item\nu,i,j\n")
    table = pa.table([["u"], ["i"], ["j"]], names=["user", "item", "item"])
    if suffix == "parquet":
        pa.parquet.write_table(table, path)
    elif suffix == "arrow":
        pa.feather.write_feather(table, path)
    assert "several columns are called 'item'" in refused(path)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (pa.array([1, 2], pa.duration("s")), "no time"),
        (pa.array([1, 2], pa.time32("s")), "no time"),
        (pa.array([[1], [2]]), "is of type list<element: int64>, which holds no value of an event"),
        (pa.array([5, 2**63 - 1], pa.timestamp("us")), "row 2: the timestamp lies outside the years 1970 to 2200"),
        (pa.array([-1, 5], pa.timestamp("ns")), "row 1: the timestamp lies outside"),
        (pa.array([5.0, float("nan")]), "row 2: the timestamp 'nan' is missing"),
    ],
)  # fmt: skip
def test_typed_columns_that_are_no_time_report_one_line_error(tmp_path: Path, values: pa.Array, word: str) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"user": ["u", "v"], "item": ["i", "j"], "timestamp": values}), path)
    assert word in refused(path)


def test_times_of_a_zone_that_the_machine_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([1_600_000_000_001], pa.timestamp("ms", "Mars/Phobos"))
    pa.parquet.write_table(pa.table({"user": ["u"], "item": ["i"], "timestamp": times}), path)
    assert read(path)["timestamp"] == [1_600_000_000.001]


def test_ids_of_odd_types(tmp_path: Path) -> None:
    pl.DataFrame({"user": ["u", "v", "u"], "item": [1, 2, 3]}).cast({"user": pl.Categorical}).write_ipc(
        tmp_path / "a.arrow"
    )
    assert read(tmp_path / "a.arrow")["user"] == ["u", "v", "u"]
    pa.parquet.write_table(pa.table({"user": [["u"]], "item": [1]}), tmp_path / "a.parquet")
    assert "column 'user' is of type list" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize("columns", [None, "user,item,timestamp"])
def test_two_columns_for_one_role_are_refused(tmp_path: Path, columns: str | None) -> None:
    path = write(tmp_path, "user_id,customer_id,item_id,product_id,time\nu,c,i,p,7\n")
    assert "'user_id' and 'customer_id' may each be the user" in refused(path, columns)
    one_user = "user=user_id,item,timestamp"
    assert "'item_id' and 'product_id' may each be the item; say which" in refused(path, one_user)
    assert read(path, "user=customer_id,item=product_id,timestamp")["item"] == ["p"]


@pytest.mark.parametrize("columns", [None, "user,item,rating,timestamp"])
def test_variants_of_a_product_and_sessions_of_a_user_give_way_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, columns: str | None
) -> None:
    text = (
        '{"rating": 5.0, "asin": "V1", "parent_asin": "P", "session_id": "S", "user_id": "A", '
        '"timestamp": 1588687728923}\n'
    )
    path = write(tmp_path, text, "reviews.jsonl")
    with caplog.at_level(logging.WARNING, logger="absl"):
        events = read(path, columns)
    assert events["item"] == ["P"] and events["user"] == ["A"]
    assert "of 'parent_asin', 'asin' the item is 'parent_asin'; item= in --columns" in caplog.text
    assert "the user is 'user_id'" in caplog.text
    other = read(path, "user=session_id,item=asin,rating,timestamp")
    assert other["item"] == ["V1"] and other["user"] == ["S"]


def test_names_of_headers_in_everyday_spelling(tmp_path: Path) -> None:
    assert read(write(tmp_path, "User ID , Item-Id,Created At\nu,i,5\n"))["timestamp"] == [5]


def test_further_columns_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item,timestamp,genre,progress\nu,i,5,sf,0.5\nu,j,6,,\n")
    events = read(path, "user,item,timestamp,category=genre:categorical,progress:numerical")
    assert events["category"] == ["sf", None] and events["progress"] == [0.5, None]
    assert "is 'genre'" in refused(path, "user,item,timestamp,genre,progress:numerical")


def test_a_further_time_with_a_zone_may_be_missing_in_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item,seen\nu,i,NA\nu,j,2010-10-19T23:55:27+02:00\n")
    (events,) = EventReader([path], ReadOptions("user,item,seen:time")).batches()
    assert events["seen"].to_pylist() == [None, 1287525327 * 10**9]


@pytest.mark.parametrize(
    ("near", "far"),
    [
        *(("2020-05-12", f"{year}-05-12") for year in ("0001", "1400", "1969", "2201", "2600", "9999")),
        *(("2020-05-12 10:00", f"{year}-05-12 10:00") for year in ("0001", "1400", "1969", "2201", "2600", "9999")),
        ("Tue Sep 26 09:43:46 -0700 2017", "Tue Sep 26 09:43:46 -0700 2817"),
    ],
)  # fmt: skip
def test_a_date_of_a_far_year_is_never_taken_for_another(tmp_path: Path, near: str, far: str) -> None:
    path = write(tmp_path, f"user,item,time\nu,i,{near}\nu,j,{near}\nu,k,{far}\n")
    message = refused(path)
    assert f"line 4: the timestamp {far!r}" in message and "outside the years 1970 to 2200" in message


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("user,item,rating\nu,i,5\nu,i,x\n", None, ["line 3", "'x'", "not a number"]),
        ("user,item,timestamp\nu,i,5\nu,i,7\nu,i,1588687728923\n", None, ["line 4", "after the year 2200",
        "--time_unit"]),
        ("user,item,date\nu,i,20230530\nu,i,20230531\nu,i,20230532\n", None, ["line 4", "not written like the times"]),
        ("user,item,date\nu,i,20-02-03\n", None, ["'20-02-03'", "no time"]),
        ("user,item,time\nu,i,2-02-03 10:00:00\n", None, ["'2-02-03 10:00:00'", "no time"]),
        ("user,item,timestamp\nu,i,soon\n", None, ["'soon'", "no time"]),
        ("user,item,seen\nu,i,\nu,j,NA\n", "user,item,seen:time", ["the first 2 rows have no seen",
        "leave the column"]),
        ("user,item\nu,i\n", "user,thing=itm", ["no column 'itm'", "'item'"]),
        ("user\titem\nu\ti\n   \nv\tj\n", None, ["line 3", "1 fields where 2 are expected"]),
        ("user,item\n1,u,i\n2,v,j\n", None, ["line 2", "3 fields where 2 are expected"]),
        ("user,item,timestamp\nu,i,5\n", "user,item,timestamp:categorical", ["timestamp has its own kind"]),
        ("user,item\nu," + "x" * 2000 + "\n", None, ["line 2", "1024 bytes"]),
        ("user,item\ru,i\r", None, ["line 1", "carriage return"]),
        ('[{"user": 1, "item": 2}]', None, ["JSON array", "one object a line"]),
        ('{"user": {"id": 1}, "item": 2}\n', None, ["'user' is an object or list"]),
        ("user,item,time\nu,i,2020-01-02\nu,i,2020-01-02 10:00:00\n", None, ["line 2", "not written like the times"]),
        ('{"user": 1, "item": 2}\n{"user": \n', None, ["line 2", "not a JSON object"]),
        ("user,userId,item\nu,v,i\n", "user,userId,item", ["may each be the user"]),
        ("user,item,timestamp,time\nu,i,5,6\n", "user,item,timestamp,time", ["may each be the timestamp"]),
        ("user_id,User ID,item\n1,2,3\n", None, ["'user_id' and 'User ID' may each be the user"]),
        ("user,item,rating,Rating\n1,2,3,4\n", None, ["'rating' and 'Rating' may each be the rating"]),
    ],
)  # fmt: skip
def test_faults_name_file_line_value_and_reason(
    tmp_path: Path, text: str, columns: str | None, words: list[str]
) -> None:
    path = write(tmp_path, text)
    message = refused(path, columns)
    assert message.startswith((str(path), "--columns"))
    for word in words:
        assert word in message


def test_what_is_read_is_logged_with_the_first_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "user_id,item,when,timestamp\nu,i,?,1588687728923\n")
    with caplog.at_level(logging.INFO, logger="absl"):
        read(path)
    assert "user = column 1 'user_id'" in caplog.text and "time = column 4 'timestamp' (milliseconds)" in caplog.text
    assert "left out: when" in caplog.text and "2020-05-05 14:08:48.923" in caplog.text


def test_parts_of_other_columns_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "user,item,rating\nu,i,4\n")
    other_order = write(tmp_path, "rating,item,user\n3,j,v\n", "b.csv")
    fewer = write(tmp_path, "user,item\nu,i\n", "c.csv")
    table = pa.concat_tables(EventReader([first, other_order], ReadOptions()).batches())
    assert table.to_pydict() == {"user": ["u", "v"], "item": ["i", "j"], "rating": [4.0, 3.0]}
    with pytest.raises(UserError, match="all files must have the same"):
        list(EventReader([first, fewer], ReadOptions()).batches())


@pytest.mark.parametrize("time", ["1600000000", "20201019"])
def test_parts_whose_times_have_other_units_are_refused(tmp_path: Path, time: str) -> None:
    first = write(tmp_path, "user,item,time\nu,i,1600000000000\n")
    other = write(tmp_path, f"user,item,time\nu,j,{time}\n", "s.csv")
    with pytest.raises(UserError, match=r"s.csv: the timestamp is in .*has milliseconds; all files must have the same"):
        list(EventReader([first, other], ReadOptions()).batches())
    assert len(list(EventReader([first, other], ReadOptions(time_unit="ms")).batches())) == 2


@pytest.mark.parametrize("numbers_first", [False, True])
def test_parts_whose_times_have_other_types(tmp_path: Path, numbers_first: bool) -> None:
    seconds = pa.array([1_600_000_000])
    kinds = (seconds, seconds.cast(pa.timestamp("s"))) if numbers_first else (seconds.cast(pa.timestamp("s")), seconds)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, times in zip(paths, kinds):
        pa.parquet.write_table(pa.table({"user": ["u"], "item": ["i"], "timestamp": times}), path)
    reader = EventReader(paths, ReadOptions())
    if numbers_first:
        assert pa.concat_tables(reader.batches())["timestamp"].to_pylist() == [1_600_000_000 * 10**9] * 2
    else:
        with pytest.raises(UserError, match=r"b.parquet, row 1: .* not written like the times before it \(dates or"):
            list(reader.batches())


def test_a_value_of_a_hundred_megabytes_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    users = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 10_000_000]))
    pa.parquet.write_table(pa.table({"user": users, "item": ["i"] * 100_000}), path)
    assert "an id has at most 1024" in refused(path)
    text = write(tmp_path, "user,item\n" + "y" * 30_000_000 + ",i\n")
    assert "1024 bytes" in refused(text) or "longer than" in refused(text)
