"""How files of ratings are laid out: their delimiter, their header, the roles of their columns."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from generative_recommenders.data.readers.ratings_table import (
    RawRatings,
    ReaderFormat,
    read_batches,
    sniff_format,
)
from generative_recommenders.errors import UserError
from ratings_files import FOUR, read, write, write_parquet


@pytest.mark.parametrize(
    ("data", "columns", "expected"),
    [
        ("a,b,1,2\n", None, ReaderFormat(",", False, FOUR)),
        ("a\tb\t1\n", None, ReaderFormat("\t", False, FOUR[:3])),
        ("a::b::1::2\n", None, ReaderFormat("::", False, FOUR)),
        ("a b\n", None, ReaderFormat(None, False, ("user", "item"))),
        ("userId,movieId,rating,timestamp\na,b,1,2\n", None, ReaderFormat(",", True, FOUR)),
        ("user|x|item\na|1|b\n", None, ReaderFormat("|", True, ("user", None, "item"))),
        ("when,who,what\n1,a,b\n", ("who", "what"), ReaderFormat(",", True, (None, "user", "item"))),
        (
            "item,user,rating,timestamp\nb,a,5,100\n",
            ("item", "user", "rating", "timestamp"),
            ReaderFormat(",", True, ("item", "user", "rating", "timestamp")),
        ),
        (
            "asin,who,unixReviewTime\nb,a,100\n",
            ("asin", "who", "unixReviewTime"),
            ReaderFormat(",", True, ("item", "user", "timestamp")),
        ),
        (
            "1;a;z;b\n",
            ("timestamp", "user", "skip", "item"),
            ReaderFormat(";", None, ("timestamp", "user", None, "item")),
        ),
    ],
)
def test_sniffing(tmp_path: Path, data: str, columns: tuple[str, ...] | None, expected: ReaderFormat) -> None:
    path = write(tmp_path, data)
    layout = sniff_format(path, columns)
    assert dataclasses.replace(layout, names=None) == expected
    assert (layout.names is not None) == (layout.has_header is True)
    assert read(path, layout)["user"] == ["a"]


def test_sniffing_refuses(tmp_path: Path) -> None:
    for data, columns, what in [
        ("", None, "empty"),
        ("1,2,3,4,5\n", None, "5 fields and no header"),
        ("a,b,c\n", ("user", "item"), "--columns names 2"),
        ("a,b,1\n", ("user", "rating", "skip"), "no column holds the item"),
        ("stars,user\n1,a\n", None, "no item among"),
        (
            "a,b\n",
            ("foo", "bar"),
            "line 1: no column 'foo' among: a, b; --columns must give names that are there",
        ),
        (
            "userId,movieId,ts\n1,2,3\n",
            ("userId", "movieId", "time"),
            "no column 'time' among: userId, movieId",
        ),
        ("user,item\na,b\n", ("user", "item=what"), "no column 'what'; it has: user, item"),
        ("who,what\na,b\n", ("who", "who"), "--columns names 'who' twice"),
        ("movieId,userId,ts\n1,2,3\n", ("user", "item", "timestamp"), "write --columns=item=movieId,..."),
    ]:
        with pytest.raises(UserError, match=what):
            sniff_format(write(tmp_path, data), columns)


@pytest.mark.parametrize(
    ("data", "delimiter"),
    [
        ("a,b;i1;5;1\n", ";"),
        ("a b,i 1,5,1\n", ","),
        ("a, i, 5, 7\n", ","),
        ("Jane Doe,b\n", ","),
        ("u\tHello, world\n", "\t"),
        ("u\tMovie 5\n", "\t"),
        ("u\ti\t5\t7\n", "\t"),
        ('"Smith, J";b1;5\n', ";"),
        ("u,i;j\nu,i\nv,j\n", ","),
    ],
)
def test_the_delimiter_is_guessed_from_whole_lines(tmp_path: Path, data: str, delimiter: str) -> None:
    path = write(tmp_path, data)
    assert sniff_format(path).delimiter == delimiter
    assert read(path, sniff_format(path))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("u1;i1;4,5;100\n", "line 1: the rating '4,5' is not a number"),
        ("u1 i1 4,5 100\n", "line 1: the rating '4,5' is not a number"),
        ("u;i;5;1\nu;i;nan;100\n", "line 2: the rating is 'nan'"),
        ("a b,2,3,4,5\n", "5 fields and no header"),
        ("A B,i,5,1\nA B,i,5,1\nA B,i,5\n", "line 3: 3 fields where 4 are expected"),
        ("a,1\nb;2\n", "line 2: 1 fields where 2 are expected"),
        (
            "Smith, J;b1;5\n",
            "the delimiter may be ',' (2 fields) or ';' (3 fields); say which with --delimiter",
        ),
        ("u1,a;b\nu2,c;d\n", "the delimiter may be ',' (2 fields) or ';' (2 fields)"),
        ("u,std::vector\n", "the delimiter may be '::' (2 fields) or ',' (2 fields)"),
    ],
)
def test_a_doubtful_delimiter_is_refused(tmp_path: Path, data: str, what: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(UserError) as caught:
        read(path, sniff_format(path))
    assert what in str(caught.value)


def test_a_given_delimiter_or_number_of_columns_decides(tmp_path: Path) -> None:
    path = write(tmp_path, "u1,a;b\nu2,c;d;e\n")
    assert read(path, sniff_format(path, delimiter=","))["item"] == ["a;b", "c;d;e"]
    path = write(tmp_path, "Smith, J;b1;5\n")
    assert sniff_format(path, ("user", "item", "rating")).delimiter == ";"
    assert sniff_format(path, delimiter=";").columns == FOUR[:3]
    assert sniff_format(write(tmp_path, "a,b  c\n"), delimiter=" ").delimiter is None
    with pytest.raises(UserError, match="--delimiter is for text"):
        sniff_format(write_parquet(tmp_path, {"user": ["a"], "item": ["b"]}), delimiter=",")


@pytest.mark.parametrize(
    ("data", "columns", "remedy"),
    [
        ("customer,product\nu,i\n", None, "give --columns=customer,product"),
        ("product,customer\ni,u\n", ("item", "user"), "give --columns=customer,product"),
        ("7,8\n", None, None),
        ("user,item\nu,i\n", None, None),
        ("customer,product\nu,i\n", ("customer", "product"), None),
        ("customer,product,3\n", None, None),
    ],
)
def test_a_first_line_that_may_be_a_header_is_said(
    tmp_path: Path,
    data: str,
    columns: tuple[str, ...] | None,
    remedy: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sniff_format(write(tmp_path, data), columns)
    line = data.split("\n", maxsplit=1)[0]
    said = f"r.csv, line 1: `{line}` is read as data; if it is a header, {remedy}"
    assert [message.endswith(said) for message in caplog.messages] == ([] if remedy is None else [True])


EVENT = "user,item,event_time\na,b,7\n"


def test_a_name_that_may_be_a_rating_or_a_time_is_refused(tmp_path: Path) -> None:
    text, parquet = (
        write(tmp_path, EVENT),
        write_parquet(tmp_path, {"who": ["a"], "what": ["b"], "when": [7]}),
    )
    for path, columns in ((text, ("user", "item", "event_time")), (parquet, ("who", "what", "when"))):
        with pytest.raises(UserError) as caught:
            sniff_format(path, columns)
        name = columns[-1]
        assert str(caught.value) == (
            f"--columns: {name!r} may be a rating or a time; write rating={name} or timestamp={name}"
        )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("user", "item", "timestamp=event_time"), {"user": ["a"], "item": ["b"], "timestamp": [7]}),
        (("rating = event_time", "item", "user"), {"user": ["a"], "item": ["b"], "rating": [7.0]}),
        (("user=item", "item=user"), {"user": ["b"], "item": ["a"]}),
        (("user", "item", "timestamp"), {"user": ["a"], "item": ["b"], "timestamp": [7]}),
    ],
)
def test_a_role_may_be_said(tmp_path: Path, columns: tuple[str, ...], expected: dict) -> None:
    text = write(tmp_path, EVENT)
    assert read(text, sniff_format(text, columns)) == expected
    if columns != ("user", "item", "timestamp"):
        parquet = write_parquet(tmp_path, {"user": ["a"], "item": ["b"], "event_time": [7]})
        assert read(parquet, sniff_format(parquet, columns)) == expected


def test_columns_that_are_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="absl")
    parquet = write_parquet(tmp_path, {"user": ["a"], "item": ["b"], "event_time": [7]})
    for path in (write(tmp_path, EVENT), parquet):
        caplog.clear()
        assert read(path, sniff_format(path)) == {"user": ["a"], "item": ["b"]}
        assert caplog.messages == [f"{path}: columns left out: event_time"]


def test_a_sniffed_header_without_a_known_name_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a,b,five,noon\nc,d,1,2\n")
    read(path, sniff_format(path, FOUR))
    assert caplog.messages == [
        f"{path}, line 1 `a,b,five,noon` is taken for a header; it is not read as a rating"
    ]


@pytest.mark.parametrize("columns", [None, ("user", "item", "rating")])
def test_files_are_read_by_their_own_headers(tmp_path: Path, columns: tuple[str, ...] | None) -> None:
    paths = [
        write(tmp_path, "user,item,rating\na,x,1\n", "1.csv"),
        write(tmp_path, "item,user,rating\ny,b,2\n", "2.csv"),
        write_parquet(tmp_path, {"rating": [3.0], "item": ["z"], "user": ["c"]}),
    ]
    tables = list(read_batches(RawRatings("t", paths, sniff_format(paths[0], columns))))
    assert [table.to_pylist() for table in tables] == [
        [{"user": "a", "item": "x", "rating": 1.0}],
        [{"user": "b", "item": "y", "rating": 2.0}],
        [{"user": "c", "item": "z", "rating": 3.0}],
    ]


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ("user,item,rating\na,x,1\n", "b,y,2\n", None),
        ("who,what,stars\na,x,1\n", "b,what,stars\n", ("who", "what", "stars")),
        ("who,what,stars\na,x,1\n", "what,who,points\ny,b,2\n", ("user", "item", "rating")),
    ],
)
def test_a_file_without_the_first_ones_header_is_refused(
    tmp_path: Path, first: str, second: str, columns: tuple[str, ...] | None
) -> None:
    paths = [write(tmp_path, first, "1.csv"), write(tmp_path, second, "2.csv")]
    with pytest.raises(UserError) as caught:
        list(read_batches(RawRatings("t", paths, sniff_format(paths[0], columns))))
    assert str(caught.value).startswith(f"{paths[1]}, line 1: `")
    assert "are not the columns of the first file" in str(caught.value)
