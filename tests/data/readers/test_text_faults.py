"""The readers of text: what they accept, and the line they name when they do not."""

from __future__ import annotations

import gzip
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.readers import tables
from generative_recommenders.data.readers import text as delimited_text
from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from ratings_files import COMMAS, PAIRS, error_of, read, write

FOUND = ReadOptions()
PAIRS_OF_COMMAS = ReadOptions("user,item", ",", header=False)
FOUR = "user,item,rating,timestamp"


def delimited(delimiter: str, columns: str = FOUR, header: bool | None = False) -> ReadOptions:
    return ReadOptions(columns, delimiter, header)


ONE_ROW = {"user": ["u"], "item": ["i"], "rating": [4.0], "timestamp": [7]}


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("u,i,4.0,7", COMMAS),
        ("u,i,4,7\r\n", COMMAS),
        ("\ufeffu,i,4,7\n", COMMAS),
        ("\n\n  \nu,i,4,7\n\n\n", COMMAS),
        ('"u","i","4","7"\n', COMMAS),
        ("u,i, 4 , 7\n", COMMAS),
        ("u,i,4e0,7.0\n", COMMAS),
        ("u::i::4::7\n", delimited("::")),
        ("u\ti\t4\t7\n", delimited("\t")),
        ("  u \t i 4   7\n", delimited(" ")),
        ("userId,asin,stars,ts\nu,i,4,7\n", FOUND),
        ("who,what,stars,when\nu,i,4,7\n", ReadOptions("user=who,item=what,rating=stars,timestamp=when")),
        ("who,what,much,when\nu,i,4,7\n", ReadOptions(FOUR)),
        ("u,i,4,7\n", ReadOptions(FOUR)),
        ("7,junk,i,4,u\n", delimited(",", "timestamp,_,item,rating,user")),
        ("userId,movieId,rating,timestamp\nu,i,4,7\n", FOUND),
        (
            "\ufeffTimestamp;x;item_id:token;user_id:token;rating\r\n7;x;i;u;4\r\n",
            ReadOptions(delimiter=";"),
        ),
    ],
)
def test_layouts(tmp_path: Path, data: str, options: ReadOptions) -> None:
    assert read(write(tmp_path, data), options) == ONE_ROW
    assert read(write(tmp_path, gzip.compress(data.encode()), "r.gz"), options) == ONE_ROW


def test_ids_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path, '"a,b",007,1,2\n"say ""hi""", x y ,1,2\nNull,漢字,1,2\n')
    assert read(path)["user"] == ["a,b", 'say "hi"', "Null"]
    assert read(path)["item"] == ["007", " x y ", "漢字"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("u,i,x,7", "the rating 'x' is not a number"),
        ("u,i,4,x", "the timestamp 'x' is not a number"),
        ("u,i,nan,7", "the rating 'nan' is missing"),
        ("u,i,inf,7", "not a finite number"),
        ("u,i,4,NaN", "the timestamp 'NaN' is missing"),
        ("u,i,1e300,7", "is too large"),
        ("u,i,,7", "the rating '' is missing"),
        ("u,i,4,", "the timestamp '' is missing"),
        ("u,i,4,-1", "the timestamp '-1' is before 1970"),
        ("u,i,4,1400000000000", "after the year 2200"),
        ("u,i,4,99999999999999999999999", "after the year 2200"),
        (",i,4,7", "the user '' is missing"),
        ("u,,4,7", "the item '' is missing"),
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
    path = write(tmp_path, "a,b,1,2\n\nc,d,1,2\n" + line + "\ne,f,1,2\n")
    message = error_of(path)
    assert message.startswith(f"{path}, line 4: ")
    assert what in message


def test_the_line_is_named_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a,b,1,2\n" * 50 + "a,b,?,2\n")
    monkeypatch.setattr(delimited_text, "BLOCK_BYTES", 64)
    assert f"{path}, line 51: the rating '?'" in error_of(path)


def test_latin1_names_the_line(tmp_path: Path) -> None:
    assert "line 2: not UTF-8" in error_of(write(tmp_path, b"a,b,1,2\n\xe4,b,1,2\n"))
    assert "line 2: not UTF-8" in error_of(write(tmp_path, b"user,item\nu,caf\xe9\n"), FOUND)
    assert "line 1: not UTF-8" in error_of(write(tmp_path, "a,b,1,2\n".encode("utf-16")))


@pytest.mark.parametrize("data", ["", "\n\n", "\ufeff", "  \n", "user,item,rating,timestamp\n"])
def test_empty_files(tmp_path: Path, data: str) -> None:
    assert "the file is empty" in error_of(write(tmp_path, data), FOUND)
    assert "the file is empty" in error_of(write(tmp_path, gzip.compress(data.encode())), FOUND)


def test_truncated_and_damaged_gzip(tmp_path: Path) -> None:
    rng = random.Random(1)
    data = gzip.compress("".join(f"u{rng.random()},i,1,2\n" for _ in range(2_000)).encode())
    assert "damaged" in error_of(write(tmp_path, data[: len(data) // 2]))
    assert "damaged" in error_of(write(tmp_path, data[:-6] + b"abcdef"))
    assert "damaged" in error_of(write(tmp_path, b"\x1f\x8bnonsense"))


@pytest.mark.parametrize("block_bytes", [32 << 20, 1_000])
def test_truncated_gzip_says_the_last_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    rng = random.Random(1)
    lines = "".join(f"u{rng.random()},i,1,2\n" for _ in range(2_000))
    data = gzip.compress(lines.encode())[:-2_000]
    whole = zlib.decompressobj(wbits=31).decompress(data).count(b"\n")
    assert 1_000 < whole < 2_000
    monkeypatch.setattr(delimited_text, "BLOCK_BYTES", block_bytes)
    assert f"cannot be read after line {whole}:" in error_of(write(tmp_path, data))


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(b"x" * (40 << 20))
    assert len(bomb) < 1 << 20
    assert "longer than" in error_of(write(tmp_path, bomb))


HUGE = "x" * (3 << 20)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.csv", f"user,item\nu,i\n{HUGE},j\n"),
        ("quoted.csv", f'user,item\nu,i\n"{HUGE}",j\n'),
        ("r.csv.gz", gzip.compress(f"user,item\nu,i\n{HUGE},j\n".encode())),
        ("r.jsonl", f'{{"user": "u", "item": "i"}}\n\n{{"user": "{HUGE}", "item": "i"}}\n'),
    ],
)
def test_a_huge_id_names_its_line(tmp_path: Path, name: str, data: str | bytes) -> None:
    path = write(tmp_path, data, name)
    with memory_grows_at_most(128):
        message = error_of(path, FOUND)
    assert message.startswith(f"{path}, line 3: ") and "longer than" in message and len(message) < 300


def test_a_long_quoted_id_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, f'user,item\nu,i\n"{HUGE[:500_000]}",j\n')
    assert f"{path}, line 3: the user 'xxx" in error_of(path, FOUND)
    unclosed = write(tmp_path, 'user,item\nu,i\n"v,j\n' + "w,k\n" * 500_000)
    assert f"{unclosed}, line 3: a quote is not closed" in error_of(unclosed, FOUND)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_huge_id_in_a_table_names_its_row(tmp_path: Path, dictionary: bool) -> None:
    table = pa.table({"user": ["u"] * 200 + [HUGE], "item": ["i"] * 201})
    pq.write_table(table, tmp_path / "r.parquet", use_dictionary=dictionary)
    assert f"row 201: the user has {len(HUGE)} bytes; an id has at most 1024" in error_of(tmp_path / "r.parquet", FOUND)


def test_long_texts_beside_the_events_are_passed_over(tmp_path: Path) -> None:
    table = pa.table({"user": ["u", "v"], "item": ["i", "j"], "review": [HUGE, "short"]})
    pq.write_table(table, tmp_path / "r.parquet")
    assert read(tmp_path / "r.parquet", FOUND)["item"] == ["i", "j"]


def test_a_table_that_unpacks_to_much_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SMALL_BYTES", 1 << 20)
    values = pa.array(["x" * 1_000_000]).take(pa.array([0] * 80))  # more than memory may grow
    table = pa.table({"user": values, "item": ["i"] * 80})
    pq.write_table(table, tmp_path / "long.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    zeros = pa.array(np.zeros(2_000_000, np.int8))
    pq.write_table(pa.table({"user": zeros, "item": zeros}), tmp_path / "rows.parquet", compression="zstd")
    for name in ("long.parquet", "rows.parquet"):
        with memory_grows_at_most(64):
            assert "bytes that unpack to" in error_of(tmp_path / name, FOUND)


@pytest.mark.parametrize("packing", ["zstd", "lz4"])
@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("dictionary", [True, False])
def test_arrow_buffers_that_claim_much_are_refused_before_they_are_read(
    tmp_path: Path, packing: str, make: Callable, dictionary: bool
) -> None:
    zeros = pa.array(np.zeros(10_000_000, np.int64))
    values = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), zeros) if dictionary else zeros
    table = pa.table({"user": values, "item": values})
    options = pa.ipc.IpcWriteOptions(compression=packing)
    with make(tmp_path / "r.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    with memory_grows_at_most(64):
        assert "bytes that unpack to" in error_of(tmp_path / "r.arrow", FOUND)


def test_an_arrow_footer_that_points_past_the_messages_is_refused(tmp_path: Path) -> None:
    data = bytearray(arrow_bytes(pa.ipc.new_file, None))
    (size,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = len(data) - 10 - size
    # After the schema lies the dictionary, the first message that the footer names.
    first = data.index(b"\xff\xff\xff\xff", 16)
    place = data.index(struct.pack("<q", first), footer)
    struct.pack_into("<q", data, place, len(data))
    assert "damaged or cut short" in error_of(write(tmp_path, bytes(data), "r.arrow"), FOUND)


def test_text_that_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited_text, "SMALL_BYTES", 8 << 20)
    for data in (b"user,item\n" * (2 << 20), b"\n" * (16 << 20), b'{"user":1,"item":2}\n' * (1 << 20)):
        path = write(tmp_path, gzip.compress(data, 9), "r.csv.gz")
        assert "it unpacks to more than 8388608 bytes" in error_of(path, FOUND)


def test_short_lines_are_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited_text, "BLOCK_LINES", 1_000)
    path = write(tmp_path, "".join(f'{n},"i{n % 3}\nx"\n' for n in range(5_000)))
    batches = list(EventReader([path], PAIRS_OF_COMMAS).batches())
    assert max(batch.num_rows for batch in batches) <= 1_000
    assert pa.concat_tables(batches)["user"].to_pylist() == [str(n) for n in range(5_000)]
    bad = write(tmp_path, "".join(f"{n},i,{n if n != 4_321 else 'x'}\n" for n in range(5_000)), "bad.csv")
    assert f"{bad}, line 4322: the rating 'x'" in error_of(bad, ReadOptions("user,item,rating"))


def test_text_as_differences_is_read_and_bounded(tmp_path: Path) -> None:
    """Parquet's DELTA_BYTE_ARRAY holds a text as the part that differs from the one before: a page of gigabytes is
    short."""
    options = {"use_dictionary": False, "write_statistics": False}
    users = [f"user{n:05}" for n in range(1_000)]
    table = pa.table({"user": users, "item": ["i"] * 1_000})
    encoding = {"user": "DELTA_BYTE_ARRAY", "item": "PLAIN"}
    pq.write_table(table, tmp_path / "r.parquet", column_encoding=encoding, row_group_size=300, **options)
    assert read(tmp_path / "r.parquet", FOUND)["user"] == users
    long = pa.array([HUGE[: 1 << 19]]).take(pa.array([0] * 100))
    table = pa.table({"user": pa.chunked_array([pa.array(["u"] * 100), *[long] * 12]), "item": ["i"] * 1_300})
    pq.write_table(table, tmp_path / "long.parquet", column_encoding=encoding, **options)
    with memory_grows_at_most(350):  # of 600
        assert "an id has at most 1024" in error_of(tmp_path / "long.parquet", FOUND)


def test_a_wrong_delimiter_shows_the_number_of_fields(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "u\ti\t4\t7\n"))
    assert "1 fields a line, but --columns names 4" in message
    assert "1 fields" in error_of(write(tmp_path, "u,i\n"), PAIRS)


@pytest.mark.parametrize(
    ("data", "columns", "delimiter"),
    [
        ("a,b;i1;5;1\n", FOUR, ";"),
        ("a b,i 1,5,1\n", FOUR, ","),
        ("a, i, 5, 7\n", FOUR, ","),
        ("Jane Doe,b\n", "user,item", ","),
        ("u\tHello, world\n", "user,item", None),
        ('"Smith, J";b1;5\n', "user,item,rating", ";"),
    ],
)
def test_delimiters_are_found_or_refused(tmp_path: Path, data: str, columns: str | None, delimiter: str | None) -> None:
    path = write(tmp_path, data)
    if delimiter is None:
        assert "the delimiter may be" in error_of(path, ReadOptions(columns))
        assert read(path, ReadOptions(columns, "\t"))["item"] == ["Hello, world"]
    else:
        assert read(path, ReadOptions(columns)) == read(path, ReadOptions(columns, delimiter))


def test_missing_columns_are_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "user,rating,timestamp\nu,1,2\n"), ReadOptions(delimiter=",", header=True))
    assert "no item among: user, rating, timestamp" in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(tmp_path / "none.csv")
    assert "not a regular file" in error_of(tmp_path)


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
    table = pa.table({"user": ["u1", "u2"], "item": ["i1", "i2"], "rating": [5.0, 4.0], "timestamp": [100, 200]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue().to_pybytes()


def arrow_bytes(make: Callable, packing: str | None) -> bytes:
    users = pa.array(["u1", "u2"] * 40).dictionary_encode()
    table = pa.table({"user": users, "item": ["i1", "i2"] * 40, "timestamp": range(80)})
    sink = pa.BufferOutputStream()
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=packing)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


SEEDS = [
    (
        b'u1,i1,5.0,100\nu2,i2,4,200\n"u,3",i3,3,300\n',
        [COMMAS, ReadOptions(FOUR), FOUND],
    ),
    (b"1::2::5::978300760\n1::3::3::978302109\n", [delimited("::")]),
    (b"196\t242\t3\t881250949\r\n186\t302\t3\t891717742\r\n", [delimited("\t")]),
    (b"1 10\n1 20\n2 10\n", [PAIRS]),
    (b"user_id,item_id,rating,timestamp\n1,2,3,4\n", [FOUND]),
    (gzip.compress(b"u1,i1,5.0,100\nu2,i2,4,200\n" * 20), [COMMAS]),
    (parquet_bytes(), [ReadOptions()]),
    (arrow_bytes(pa.ipc.new_file, "zstd"), [ReadOptions()]),
    (arrow_bytes(pa.ipc.new_stream, "lz4"), [ReadOptions()]),
    (arrow_bytes(pa.ipc.new_stream, None), [ReadOptions()]),
]


def fuzz_reader(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Read ``count`` damaged files; any error but UserError in one line escapes. Returns (accepted,
    refused)."""
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(count):
        data, options = rng.choice(SEEDS)
        path = write(folder, mutate(rng, data))
        try:
            table = read(path, rng.choice(options))
            assert np.isfinite(table.get("rating", [0.0])).all()
            assert all(table["user"])
            assert all(table["item"])
            accepted += 1
            EventReader([path], ReadOptions(FOUR))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    return accepted, refused


@memory_grows_at_most(256)
def test_fuzz(tmp_path: Path) -> None:
    accepted, refused = fuzz_reader(tmp_path, 11, 1_500)
    assert accepted > 100
    assert refused > 100


@pytest.mark.slow
def test_fuzz_at_length(tmp_path: Path) -> None:
    accepted, refused = fuzz_reader(tmp_path, 12, int(os.environ.get("FUZZ_INPUTS", "100000")))
    assert accepted and refused


def test_a_header_in_another_order_than_the_columns_is_read_by_its_names(tmp_path: Path) -> None:
    path = write(tmp_path, "movieId,userId,rating,timestamp\n3,4,5,6\n")
    assert read(path, ReadOptions(FOUR))["user"] == ["4"]
    other = write(tmp_path, "movieId,userId\n3,4\n", "other.csv")
    assert read(other, ReadOptions("item,user"))["user"] == ["4"]
