"""Data sources by name: published files, checksums, CSV files and their options."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from generative_recommenders.data.readers.events import EventReader, RawRatings, ReadOptions
from generative_recommenders.data.sources import public as public_datasets
from generative_recommenders.data.sources.download import RemoteFile
from generative_recommenders.data.sources.public import PUBLISHED, resolve
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.errors import UserError
from ratings_files import write_zip

ML_1M = {
    "ml-1m/ratings.dat": b"1::1193::5::978300760\n2::661::3::978302109\n",
    "ml-1m/movies.dat": b"661::James and the Giant Peach (1996)::Musical\n1193::Cuckoo (1975)::Drama\n",
    "ml-1m/users.dat": b"1::F::1::10::48067\n2::M::56::16::70072\n",
    "ml-1m/README": b"about\n",
}
ML_20M = {
    "ml-20m/ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n",
    "ml-20m/movies.csv": b'movieId,title,genres\n2,"Net, The (1995)",Action|Thriller\n',
}
ML_100K = {
    "ml-100k/u.data": b"196\t242\t3\t881250949\n",
    "ml-100k/u.item": b"242|Kolya (1996)|24-Jan-1997||http://x" + b"|0" * 5 + b"|1" + b"|0" * 13 + b"\n",
    "ml-100k/u.user": b"196|49|M|writer|55105\n",
}
SETS = {"ml-1m": ML_1M, "ml-20m": ML_20M, "ml-100k": ML_100K}

Packer = Callable[[Path, dict[str, bytes]], Path]


def _folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(_folder(path.parent / f"{path.name}-content", members), arcname=".")
    return path


def _resolve(name: str, tmp_path: Path, raw_path: Path | None, **options: object) -> RawRatings:
    return resolve(name, raw_path=raw_path, data_root=tmp_path / "data", progress=False, **options)  # type: ignore[arg-type]


def events(raw: RawRatings) -> dict[str, list]:
    return pa.concat_tables(EventReader(raw.files, raw.options).batches()).to_pydict()


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"unknown data source 'ml-2m' .*did you mean 'ml-20m'\?; known: synthetic-books, .*csv",
    ):
        _resolve("ml-2m", tmp_path, None)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("pack", [_folder, write_zip, _tar])
def test_movielens_from_folder_and_archives(tmp_path: Path, name: str, pack: Packer) -> None:
    raw = _resolve(name, tmp_path, pack(tmp_path / "input", SETS[name]))
    assert raw.name == name and raw.filter == "none"
    assert raw.files[0].read_bytes() == next(iter(SETS[name].values()))
    assert raw.item_features is not None and raw.item_features.num_rows == (2 if name == "ml-1m" else 1)
    assert (raw.user_features is not None) == (name != "ml-20m")
    assert raw.expected_items is None and raw.expected_users is None


@pytest.mark.parametrize(
    ("name", "members", "read"),
    [
        ("ml-1m", ML_1M, {"user": ["1", "2"], "item": ["1193", "661"], "rating": [5.0, 3.0]}),
        ("ml-20m", ML_20M, {"user": ["1"], "item": ["2"], "rating": [3.5]}),
        ("ml-100k", ML_100K, {"user": ["196"], "item": ["242"], "rating": [3.0]}),
        (
            "amzn-books",
            {"ratings.csv": b"A1,0001,5.0,1382659200\n"},
            {"user": ["A1"], "item": ["0001"], "rating": [5.0]},
        ),
    ],
)
def test_events_of_the_published_files(tmp_path: Path, name: str, members: dict[str, bytes], read: dict) -> None:
    """Each in its own layout, from the first line or after a header."""
    raw = _resolve(name, tmp_path, _folder(tmp_path / "in", members) / next(iter(members)))
    found = events(raw)
    assert {column: found[column] for column in read} == read and len(found["timestamp"]) == len(read["user"])


def test_a_published_file_has_a_second_address_and_a_checksum() -> None:
    assert all(len(each.archive.urls) >= 2 and each.archive.checksum for each in PUBLISHED.values())


def test_plain_http_is_for_files_with_a_sha256_alone() -> None:
    plain = {
        name for name, each in PUBLISHED.items() if not all(url.startswith("https://") for url in each.archive.urls)
    }
    assert {PUBLISHED[name].archive.algorithm for name in plain} == {"sha256"}


def test_features_belong_to_the_files(tmp_path: Path) -> None:
    raw = _resolve("ml-100k", tmp_path, write_zip(tmp_path / "x.zip", ML_100K))
    assert raw.item_features is not None and raw.user_features is not None
    assert raw.item_features.to_pylist() == [{"item": "242", "title": "Kolya", "year": 1996.0, "genres": ["Comedy"]}]
    assert raw.user_features.to_pylist()[0]["age"] == "45"


def test_ml_100k_from_compressed_files_with_headed_films(tmp_path: Path) -> None:
    films = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    films += "242\tKolya\t1996\tComedy\n"
    members = {
        "u.data.gz": gzip.compress(ML_100K["ml-100k/u.data"]),
        "u.item.tsv.gz": gzip.compress(films.encode()),
    }
    raw = _resolve("ml-100k", tmp_path, _folder(tmp_path / "in", members))
    assert raw.files == [tmp_path / "in" / "u.data.gz"] and raw.user_features is None
    assert raw.item_features is not None and raw.item_features["genres"].to_pylist() == [["Comedy"]]


def test_counts_are_expected_of_the_published_archive_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_zip(tmp_path / "anything.zip", ML_1M)
    digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    published = dataclasses.replace(PUBLISHED["ml-1m"], archive=RemoteFile("ml-1m.zip", (), digest))
    monkeypatch.setitem(public_datasets.PUBLISHED, "ml-1m", published)
    raw = _resolve("ml-1m", tmp_path, archive)
    assert (raw.expected_items, raw.expected_users) == (3_706, 6_040)
    assert _resolve("ml-1m", tmp_path, archive, k_core=2).expected_items is None
    assert (
        _resolve("ml-1m", tmp_path, write_zip(tmp_path / "b.zip", {**ML_1M, "ml-1m/README": b"!"})).expected_items
        is None
    )


@pytest.mark.parametrize("packed", [False, True])
def test_counts_are_expected_of_ratings_of_the_published_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    content = ML_1M["ml-1m/ratings.dat"]
    published = dataclasses.replace(PUBLISHED["ml-1m"], ratings_bytes=len(content))
    monkeypatch.setitem(public_datasets.PUBLISHED, "ml-1m", published)
    path = tmp_path / "mine.txt"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert _resolve("ml-1m", tmp_path, path).expected_items == 3_706
    path.write_bytes(gzip.compress(content + b"\n") if packed else content + b"\n")
    assert _resolve("ml-1m", tmp_path, path).expected_items is None


@pytest.mark.parametrize("packed", [False, True])
def test_amazon_books_are_known_by_their_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    content = b"A1,0001,5.0,1382659200\n"
    remote = dataclasses.replace(PUBLISHED["amzn-books"].archive, checksum=hashlib.sha256(content).hexdigest())
    published = dataclasses.replace(PUBLISHED["amzn-books"], archive=remote)
    monkeypatch.setitem(public_datasets.PUBLISHED, "amzn-books", published)
    path = tmp_path / "ratings.csv"
    path.write_bytes(gzip.compress(content) if packed else content)
    raw = _resolve("amzn-books", tmp_path, path)
    assert (raw.files, raw.filter) == ([path], "amazon_five")
    assert (raw.expected_items, raw.expected_users) == (695_762, 694_897)
    path.write_bytes(gzip.compress(content * 9)[:-5] if packed else content * 9)
    assert _resolve("amzn-books", tmp_path, path).expected_items is None


def test_no_network_says_where_the_file_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFile("ml-1m.zip", ("http://127.0.0.1:9/ml-1m.zip",), "0" * 32)
    monkeypatch.setitem(public_datasets.PUBLISHED, "ml-1m", dataclasses.replace(PUBLISHED["ml-1m"], archive=remote))
    place = tmp_path / "data" / "raw" / "ml-1m" / "ml-1m.zip"
    with pytest.raises(UserError, match=f"by hand and put it at {place}"):
        _resolve("ml-1m", tmp_path, None)


def test_a_file_put_by_hand_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "raw" / "ml-1m"
    folder.mkdir(parents=True)
    digest = hashlib.md5(write_zip(folder / "ml-1m.zip", ML_1M).read_bytes(), usedforsecurity=False).hexdigest()
    published = dataclasses.replace(PUBLISHED["ml-1m"], archive=RemoteFile("ml-1m.zip", (), digest))
    monkeypatch.setitem(public_datasets.PUBLISHED, "ml-1m", published)
    raw = _resolve("ml-1m", tmp_path, None)
    assert raw.files == [folder / "ratings.dat"] and raw.expected_items == 3_706


def test_archives_of_one_data_set_do_not_replace_each_other(tmp_path: Path) -> None:
    first, second = (
        _resolve(
            "csv", tmp_path, write_zip(tmp_path / f"{name}.zip", {"ratings.csv": f"user,item\n{name},i\n".encode()})
        )
        for name in ("a", "b")
    )
    assert events(first)["user"] == ["a"] and events(second)["user"] == ["b"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_sasrec_text(tmp_path: Path, as_folder: bool) -> None:
    side = {name.split("/")[1]: content for name, content in ML_1M.items() if "ratings" not in name}
    folder = _folder(tmp_path / "in", {"interactions.txt.gz": gzip.compress(b"1 661\n1 1193\n"), **side})
    raw = _resolve("sasrec-text", tmp_path, folder if as_folder else folder / "interactions.txt.gz")
    assert raw.files == [folder / "interactions.txt.gz"]
    assert events(raw) == {"user": ["1", "1"], "item": ["661", "1193"]}
    assert (raw.item_features is not None) == (raw.user_features is not None) == as_folder


@pytest.mark.parametrize(("header", "first"), [("user item\n", "1"), ("", "1"), ("customer product\n", "customer")])
def test_a_header_of_sasrec_text_is_left_out_where_it_is_one(tmp_path: Path, header: str, first: str) -> None:
    path = tmp_path / "in.txt"
    path.write_text(header + "1 661\n1 1193\n")
    assert events(_resolve("sasrec-text", tmp_path, path))["user"][0] == first


def test_csv_has_a_name_and_a_filter(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("who;what;stars\na;x;5\nb;y;4\n")
    options = ReadOptions("user=who, item=what, rating=stars")
    raw = _resolve("csv", tmp_path, path, options=options, result_name="mine", k_core=3)
    assert (raw.name, raw.files, raw.filter) == ("mine", [path], "k_core:3")
    assert events(raw) == {"user": ["a", "b"], "item": ["x", "y"], "rating": [5.0, 4.0]}


@pytest.mark.parametrize("pack", [_folder, write_zip])
def test_csv_of_several_files(tmp_path: Path, pack: Packer) -> None:
    members = {
        "a.csv": b"user,item\na,x\n",
        "b.csv": b"user,item\nb,y\n",
        ".hidden.csv": b"",
        "about.md": b"",
        "README.txt": b"not data",
    }
    raw = _resolve("csv", tmp_path, pack(tmp_path / "input", members))
    assert [path.name for path in raw.files] == ["a.csv", "b.csv"]


def test_synthetic_books(tmp_path: Path) -> None:
    settings = SyntheticBooksSettings(num_users=50, num_items=40, seed=3)
    raw = _resolve("synthetic-books", tmp_path, None, synthetic=settings)
    assert raw.filter == "amazon_five" and raw.item_features is not None and raw.item_features.num_rows == 40
    assert raw.files == [tmp_path / "data" / "raw" / "synthetic-books" / "ratings.csv"]
    assert raw.source["settings"]["seed"] == 3


@pytest.mark.parametrize("name", ["synthetic-books", "ml-1m"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=str(tmp_path / "data")):
        _resolve(name, tmp_path, None)


@pytest.mark.parametrize("name, options, message", [
    ("csv", {}, "needs --raw_path"),
    ("sasrec-text", {}, "needs --raw_path"),
    ("csv", {"raw_path": Path("nowhere.csv")}, "nowhere.csv does not exist"),
    ("ml-1m", {"options": ReadOptions("user,item")}, "of ml-1m are known"),
    ("ml-1m", {"options": ReadOptions(delimiter=";")}, "of ml-1m are known"),
    ("csv", {"k_core": 0}, "--k_core=0 must be at least 1"),
    ("csv", {"result_name": "../up"}, "--name='../up'"),
    ("synthetic-books", {"raw_path": Path()}, "generated"),
    ("ml-20m", {"raw_path": Path(__file__).parent}, "holds no ratings.csv"),
    ("sasrec-text", {"raw_path": Path(__file__).parent}, "holds no interactions.txt"),
    ("csv", {"raw_path": Path(__file__).parents[3] / "benchmarks"}, "holds no file that ends in"),
])  # fmt: skip
def test_faults_report_one_line_errors(tmp_path: Path, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _resolve(name, tmp_path, **{"raw_path": None, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ml-1m", "amzn-books", "sasrec-text"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: holds no "):
        _resolve(name, tmp_path, tmp_path / "pipe")


def test_the_header_of_ml_20m_names_the_columns(tmp_path: Path) -> None:
    swapped = {**ML_20M, "ml-20m/ratings.csv": b"movieId,userId,rating,timestamp\n5,6,3.5,1112486027\n"}
    assert events(_resolve("ml-20m", tmp_path, _folder(tmp_path / "in", swapped)))["user"] == ["6"]
    absent = {**ML_20M, "ml-20m/ratings.csv": b"1,2,3.5,1112486027\n5,6,3.5,1112486027\n"}
    with pytest.raises(UserError, match="no column 'userId'"):
        events(_resolve("ml-20m", tmp_path, _folder(tmp_path / "absent", absent)))


def test_a_header_in_one_file_of_several_is_refused(tmp_path: Path) -> None:
    members = {"a.csv": b"a,x\n", "b.csv": b"user,item\nb,y\n", "c.csv": b"c,z\n"}
    raw = _resolve("csv", tmp_path, _folder(tmp_path / "input", members), options=ReadOptions("user,item"))
    with pytest.raises(UserError, match="b.csv: it has .*all files must have the same"):
        events(raw)
