"""The readers of text: what they accept, and the line they name when they do not."""

from __future__ import annotations

import gzip
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.readers import delimited as delimited_reader
from generative_recommenders.data.readers.ratings_table import (
    RawRatings,
    ReaderFormat,
    read_batches,
    sniff_format,
)
from generative_recommenders.data.readers.strict_lines import parse_lines
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from ratings_files import CSV, FOUR, PAIRS, error_of, read, write

ONE_ROW = {"user": ["u"], "item": ["i"], "rating": [4.0], "timestamp": [7]}


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ("u,i,4.0,7", CSV),
        ("u,i,4,7\r\n", CSV),
        ("\ufeffu,i,4,7\n", CSV),
        ("\n\n  \nu,i,4,7\n\n\n", CSV),
        ('"u","i","4","7"\n', CSV),
        ("u,i, 4 , 7\n", CSV),
        ("u,i,4e0,7.0\n", CSV),
        ("u::i::4::7\n", ReaderFormat("::", False)),
        ("u\ti\t4\t7\n", ReaderFormat("\t", False)),
        ("  u \t i 4   7\n", ReaderFormat(None, False)),
        ("userId,asin,stars,ts\nu,i,4,7\n", ReaderFormat(",", True)),
        ("who,what,stars,when\nu,i,4,7\n", ReaderFormat(",", None)),
        ("u,i,4,7\n", ReaderFormat(",", None)),
        ("7,junk,i,4,u\n", ReaderFormat(",", False, ("timestamp", None, "item", "rating", "user"))),
        ("userId,movieId,rating,timestamp\nu,i,4,7\n", ReaderFormat(",", None, None)),
        (
            "\ufeffTimestamp;x;item_id:token;user_id:token;rating\r\n7;x;i;u;4\r\n",
            ReaderFormat(";", True, None),
        ),
    ],
)
def test_layouts(tmp_path: Path, data: str, layout: ReaderFormat) -> None:
    assert read(write(tmp_path, data), layout) == ONE_ROW
    assert read(write(tmp_path, gzip.compress(data.encode()), "r.gz"), layout) == ONE_ROW


def test_ids_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path, '"a,b",007,1,2\n"say ""hi""", x y ,1,2\nnull,漢字,1,2\n')
    assert read(path)["user"] == ["a,b", 'say "hi"', "null"]
    assert read(path)["item"] == ["007", " x y ", "漢字"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("u,i,x,7", "the rating 'x' is not a number"),
        ("u,i,4,x", "the timestamp 'x' is not a number"),
        ("u,i,nan,7", "the rating is 'nan', not a finite number"),
        ("u,i,inf,7", "not a finite number"),
        ("u,i,4,NaN", "the timestamp is 'NaN'"),
        ("u,i,1e300,7", "is too large"),
        ("u,i,,7", "the rating '' is not a number"),
        ("u,i,4,", "the timestamp '' is not a number"),
        ("u,i,4,-1", "the timestamp '-1' is negative"),
        ("u,i,4,1400000000000", "after the year 2200; times are in seconds"),
        ("u,i,4,99999999999999999999999", "after the year 2200"),
        ("u,i,4,1.5", "not a whole number of seconds"),
        (",i,4,7", "the user is empty"),
        ("u,,4,7", "the item is empty"),
        ("u,i,4", "3 fields where 4 are expected"),
        ("u,i,4,7,8", "5 fields where 4 are expected"),
        ("u;i;4;7", "1 fields where 4 are expected"),
        ('u,"i,4,7', "quote"),
        ("u,i\0,4,7", "a NUL byte"),
        ("u,i\r,4,7", "carriage return"),
        ("u,i,1_0,7", "'1_0' is not a number"),
        ("u,i,٣,7", "is not a number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path, "a,b,1,2\n\nc,d,1,2\n" + line + "\ne,f,x,-1\n")
    message = error_of(path)
    assert message.startswith(f"{path}, line 4: ")
    assert what in message


def test_the_line_is_named_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a,b,1,2\n" * 50 + "a,b,?,2\n")
    monkeypatch.setattr(delimited_reader.read_blocks, "__defaults__", (64, 1 << 20))
    assert f"{path}, line 51: the rating '?'" in error_of(path)


def test_latin1_names_the_line(tmp_path: Path) -> None:
    assert "line 2: not UTF-8" in error_of(write(tmp_path, b"a,b,1,2\n\xe4,b,1,2\n"))
    assert "line 1: not UTF-8" in error_of(write(tmp_path, "a,b,1,2\n".encode("utf-16")))


@pytest.mark.parametrize("data", ["", "\n\n", "\ufeff", "  \n"])
def test_empty_files(tmp_path: Path, data: str) -> None:
    assert "the file is empty" in error_of(write(tmp_path, data))
    assert "the file is empty" in error_of(write(tmp_path, gzip.compress(data.encode())))


def test_a_header_alone_is_empty(tmp_path: Path) -> None:
    assert "the file is empty" in error_of(
        write(tmp_path, "user,item,rating,time\n"), ReaderFormat(",", True)
    )


def test_truncated_and_damaged_gzip(tmp_path: Path) -> None:
    rng = random.Random(1)
    data = gzip.compress("".join(f"u{rng.random()},i,1,2\n" for _ in range(2_000)).encode())
    assert "gzip data truncated or damaged" in error_of(write(tmp_path, data[: len(data) // 2]))
    assert "gzip data truncated or damaged" in error_of(write(tmp_path, data[:-6] + b"abcdef"))
    assert "gzip data truncated or damaged" in error_of(write(tmp_path, b"\x1f\x8bnonsense"))


@pytest.mark.parametrize("block_bytes", [32 << 20, 1_000])
def test_truncated_gzip_says_the_last_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    rng = random.Random(1)
    lines = "".join(f"u{rng.random()},i,1,2\n" for _ in range(2_000))
    data = gzip.compress(lines.encode())[:-2_000]
    whole = zlib.decompressobj(wbits=31).decompress(data).count(b"\n")
    assert 1_000 < whole < 2_000
    monkeypatch.setattr(delimited_reader.read_blocks, "__defaults__", (block_bytes, 1 << 20))
    assert f"truncated or damaged after line {whole};" in error_of(write(tmp_path, data))


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(b"x" * (40 << 20))
    assert len(bomb) < 1 << 20
    assert "longer than" in error_of(write(tmp_path, bomb))


def test_wrong_delimiter_is_recognised(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "u\ti\t4\t7\n"))
    assert "line 1: 1 fields where 4 columns are expected; the delimiter looks like '\\t', not ','" in message
    assert "looks like ','" in error_of(write(tmp_path, "u,i\n"), PAIRS)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "user,rating,timestamp\nu,1,2\n"), ReaderFormat(",", True, None))
    assert "missing column: no item among: user, rating, timestamp" in message
    assert "3 fields where 4 columns" in error_of(write(tmp_path, "u,i,4\n"))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(tmp_path / "none.csv")
    assert "cannot be read" in error_of(tmp_path)


def test_files_with_different_columns_are_refused(tmp_path: Path) -> None:
    layout = ReaderFormat(",", True, None)
    paths = [
        write(tmp_path, "user,item,rating\nu,i,1\n", "1.csv"),
        write(tmp_path, "user,item\nu,i\n", "2.csv"),
    ]
    with pytest.raises(UserError, match="2.csv: it has user, item, but"):
        list(read_batches(RawRatings("t", paths, layout)))


fields = st.text(st.sampled_from('ab1.-+e _\t"é漢:,;\x1f\x85\u2028'), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.lists(fields, min_size=1, max_size=5), min_size=1, max_size=6),
    numbers=st.sampled_from(["4,7", "4.5,9", "1e1,0", " 3,8 ", "-1,7.0"]),
    delimiter=st.sampled_from([",", "::", None, "\t"]),
)
def test_both_parsers_agree(lines: list[list[str]], numbers: str, delimiter: str | None) -> None:
    """Whatever the fast parser accepts, the strict one accepts with the same rows."""
    joint = " " if delimiter is None else delimiter
    rows = [joint.join([*fields[:2], *numbers.split(",")]) for fields in lines]
    block = delimited_reader.Block("\n".join(rows).encode(), 1)
    fast = delimited_reader.parse_fast(block, delimiter, FOUR)
    if fast is not None:
        assert fast.equals(parse_lines(Path("f"), block.data, 1, delimiter, FOUR))


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few random edits: bytes flipped, cut, doubled, replaced by characters that mean something."""
    pieces = [
        b",",
        b'"',
        b"\n",
        b"\r\n",
        b"\0",
        b"-",
        b"1e99",
        b"\xff",
        b"::",
        b"\t",
        b"nan",
        b"\xef\xbb\xbf",
        b"",
    ]
    for _ in range(rng.randint(1, 2)):
        at, until = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        until = min(until, at + rng.randint(0, 3))
        data = data[:at] + rng.choice([*pieces, bytes([rng.randrange(256)])]) + data[until:]
    return data


def parquet_bytes() -> bytes:
    """Uncompressed, so that edits reach the values."""
    table = pa.table(
        {"user": ["u1", "u2"], "item": ["i1", "i2"], "rating": [5.0, 4.0], "timestamp": [100, 200]}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue().to_pybytes()


SEEDS = [
    (
        b'u1,i1,5.0,100\nu2,i2,4,200\n"u,3",i3,3,300\n',
        [CSV, ReaderFormat(",", None), ReaderFormat(",", True, None)],
    ),
    (b"1::2::5::978300760\n1::3::3::978302109\n", [ReaderFormat("::", False)]),
    (b"196\t242\t3\t881250949\r\n186\t302\t3\t891717742\r\n", [ReaderFormat("\t", False)]),
    (b"1 10\n1 20\n2 10\n", [PAIRS]),
    (b"user_id,item_id,rating,timestamp\n1,2,3,4\n", [ReaderFormat(",", None, None)]),
    (gzip.compress(b"u1,i1,5.0,100\nu2,i2,4,200\n" * 20), [CSV]),
    (parquet_bytes(), [ReaderFormat(columns=None)]),
]


def fuzz_reader(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Read ``count`` damaged files; any error but UserError in one line escapes. Returns (accepted,
    refused)."""
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(count):
        data, layouts = rng.choice(SEEDS)
        path = write(folder, mutate(rng, data))
        try:
            table = read(path, rng.choice(layouts))
            assert np.isfinite(table.get("rating", [0.0])).all()
            assert all(table["user"])
            assert all(table["item"])
            accepted += 1
            sniff_format(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    return accepted, refused


@memory_grows_at_most(256)
def test_fuzz(tmp_path: Path) -> None:
    accepted, refused = fuzz_reader(tmp_path, 11, 1_000)
    assert accepted > 100
    assert refused > 100


@pytest.mark.slow
def test_fuzz_at_length(tmp_path: Path) -> None:
    fuzz_reader(tmp_path, 12, int(os.environ.get("FUZZ_INPUTS", "100000")))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("1,2,3.5,1112486027", "'1' is in the place of the user's name"),
        ("movieId,userId,rating,timestamp", "'movieId' is in the place of the user's name"),
        ("userId,movieId,timestamp,rating", "'timestamp' is in the place of the rating's name"),
    ],
)
def test_a_header_that_must_be_there_names_the_roles(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path, f"{line}\n3,4,5,6\n")
    message = error_of(path, ReaderFormat(",", True))
    assert message.startswith(f"{path}, line 1: no header: {what}; the columns must be user, item, rating, ")


def test_a_header_that_is_guessed_is_in_the_order_of_the_roles(tmp_path: Path) -> None:
    path = write(tmp_path, "movieId,userId,rating,timestamp\n3,4,5,6\n")
    assert "line 1: column 'movieId' is in the place of the user; write --columns=item=movieId" in error_of(
        path, ReaderFormat(",", None)
    )


def test_a_header_without_a_known_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a,b,five,noon\nc,d,1,2\n")
    assert read(path, ReaderFormat(",", None))["user"] == ["c"]
    assert [f"{path}, line 1 `a,b,five,noon` is taken for a header" in text for text in caplog.messages] == [
        True
    ]
