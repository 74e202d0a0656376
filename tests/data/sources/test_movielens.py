"""Readers of MovieLens' films and users, and their faults."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from generative_recommenders.data.feature_tables import describe
from generative_recommenders.data.sources import movielens
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from ratings_files import write

FLAGS = "|".join("1" if genre in {"Drama", "War"} else "0" for genre in movielens.GENRES_100K)

GOOD: dict[str, bytes] = {
    "movies.dat": "1::Misérables, Les (1995)::Drama|War\n2::No Year::\n".encode("latin-1"),
    "movies.csv": (
        'movieId,title,genres\r\n1,"Misérables, Les (1995)",Drama|War\r\n2,No Year,(no genres listed)\r\n'
    ).encode(),
    "u.item": (f"1|Misérables, Les (1995)|01-Jan-1995||http://x|{FLAGS}\n2|No Year||||1" + "|0" * 18 + "\n").encode(
        "latin-1"
    ),
    "u.item.tsv": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tMisérables, Les\t1995\tDrama War\n2\tNo Year\t\t\n"
    ).encode(),
    "users.dat": b"1::F::25::10::48067\n2::M::1::0::70072-1234\n",
    "u.user": b"1|27|F|writer|48067\n2|7|M|student|T8H1N\n",
}
FILMS = [name for name in GOOD if not name.startswith(("users", "u.user"))]


def _read(tmp_path: Path, name: str, content: bytes) -> pa.Table:
    return movielens.read_side_file(name, write(tmp_path, content, name))


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_all_film_formats_say_the_same(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    table = _read(tmp_path, name, compress(GOOD[name]))
    assert table.schema.equals(movielens.ITEM_SCHEMA)
    kinds = [(spec.name, spec.kind) for spec in describe("item", table.drop_columns("item"))]
    assert kinds == [("title", "text"), ("year", "numerical"), ("genres", "categorical_list")]
    assert table.to_pylist() == [
        {"item": "1", "title": "Misérables, Les", "year": 1995.0, "genres": ["Drama", "War"]},
        {"item": "2", "title": "No Year", "year": None, "genres": []},
    ]


def test_users_of_both_formats(tmp_path: Path) -> None:
    first = _read(tmp_path, "users.dat", GOOD["users.dat"]).to_pylist()
    assert first[0] == {"user": "1", "gender": "F", "age": "25", "occupation": "10", "zip": "48067"}
    second = _read(tmp_path, "u.user", GOOD["u.user"]).to_pylist()
    assert second[0] == {"user": "1", "gender": "F", "age": "25", "occupation": "writer", "zip": "48067"}
    assert second[1]["age"] == "1"


@pytest.mark.parametrize(
    "age, bucket", [(17, "1"), (18, "18"), (24, "18"), (49, "45"), (50, "50"), (55, "50"), (90, "56")]
)
def test_ages_fall_into_buckets(tmp_path: Path, age: int, bucket: str) -> None:
    assert _read(tmp_path, "u.user", f"1|{age}|F|writer|1\n".encode())["age"].to_pylist() == [bucket]


@pytest.mark.parametrize("name, content, message", [
    ("movies.dat", b"1::A (1990)::War\n\n3::B\n", "line 3: 2 fields instead of 3"),
    ("movies.dat", b"1::A::War\n1::B::War\n", "line 2: id 1 appears twice"),
    ("movies.dat", b"::A::War\n", "line 1: the id is empty"),
    ("movies.dat", b"\n", "holds no rows"),
    ("movies.csv", b"id,title,genres\n1,a,b\n", "line 1: the header must be movieId,title,genres"),
    ("movies.csv", b"movieId,title,genres\n1,a\n", "line 2: 2 fields instead of 3"),
    ("movies.csv", b'movieId,title,genres\n1,"a,b\n', "line 2: unexpected end of data"),
    ("u.item", b"1|A|||" + b"|x" * 19 + b"\n", "line 1: a genre flag is neither 0 nor 1"),
    ("u.user", b"1|old|F|writer|1\n", "line 1: invalid literal for int"),
    ("users.dat", gzip.compress(b"1::F::1::1::1\n", mtime=0)[:-9], "cannot be read"),
])  # fmt: skip
def test_faults_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _read(tmp_path, name, content)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    table = _read(tmp_path, "movies.dat", b"\xef\xbb\xbf1::A (1990)::War\r\n2::B::Drama\r\n")
    assert table["item"].to_pylist() == ["1", "2"] and table["genres"].to_pylist() == [["War"], ["Drama"]]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_unpacks_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(movielens, "MAX_BYTES", 1 << 20)
    content = pack(b"1::A::" + b"x" * (64 << 20))
    with (
        memory_grows_at_most(16),
        pytest.raises(UserError, match="movies.dat: longer than 1048576 bytes") as caught,
    ):
        _read(tmp_path, "movies.dat", content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", [200, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GOOD)
@memory_grows_at_most(256)
def test_damage_gives_rows_or_one_line_error(tmp_path: Path, name: str, inputs: int) -> None:
    """Damaged inputs of each format: cut, doubled and overwritten bytes."""
    rng = random.Random(name)
    good = GOOD[name]
    alphabet = b"|:,\t\n\r\"'0a\x00\xe9\xff\x1f\x8b"
    refused = 0
    for _ in range(inputs):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(content))
            content[place : place + rng.randrange(3)] = bytes(rng.choices(alphabet, k=rng.randrange(4)))
        try:
            table = _read(tmp_path, name, bytes(content))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert 1 <= table.num_rows == len(set(table[0].to_pylist()))
    assert refused > inputs // 10
