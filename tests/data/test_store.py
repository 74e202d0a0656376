"""Opening prepared folders, whole and damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data.manifest import read_manifest
from generative_recommenders.data.store import SequenceDataset, read_rows
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from ratings_files import write
from tiny_data import dataset_of, rewrite_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    columns = {"user": "babb", "item": "yxxz", "rating": [1, 2, 3, 4], "timestamp": [30, 20, 10, 40]}
    features = pa.table({"item": ["x", "y", "z"], "genre": ["g", "h", "g"]})
    return dataset_of(columns, tmp_path / "out", item_features=features).folder


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        SequenceDataset.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns(folder: Path) -> None:
    dataset = SequenceDataset.open(str(folder))
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == (2, 3, 4)
    assert dataset.offsets.tolist() == [0, 1, 4]
    assert dataset.items.tolist() == [1, 1, 2, 3]
    assert dataset.ratings is not None
    assert dataset.timestamps is not None
    assert dataset.ratings.tolist() == [2, 3, 1, 4]
    assert dataset.timestamps.tolist() == [20, 10, 30, 40]
    types = [column.dtype for column in (dataset.items, dataset.ratings, dataset.timestamps, dataset.offsets)]
    assert types == [np.int32, np.float32, np.int64, np.int64]
    assert isinstance(dataset.items, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.items[0] = 2


def test_missing_folder(tmp_path: Path) -> None:
    assert "not a prepared folder" in error_of(tmp_path)
    assert "not a prepared folder" in error_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        (None, None),
        ({}, None),
        ([], "'split_hashes': Input should be a valid dictionary, and is '[]'; prepare the data again"),
        ({"paper": 1}, "'split_hashes.paper': Input should be a valid string, and is '1'; prepare the data"),
    ],
)
def test_split_hashes_may_be_absent(folder: Path, stored: object, what: str | None) -> None:
    assert set(read_manifest(folder).split_hashes) == {"leave_one_out", "paper", "global_time"}
    rewrite_manifest(folder, {"split_hashes": stored}, ["split_hashes"] if stored is None else [])
    if what is None:
        assert SequenceDataset.open(folder).manifest.split_hashes == {}
    else:
        assert what in error_of(folder)


def test_another_version(folder: Path) -> None:
    rewrite_manifest(folder, {"version": 7})
    assert "prepared by version 7, this program reads 2; prepare the data again" in error_of(folder)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("lengths", {}, "'lengths': min is None, and is '{}'"),
        (
            "lengths",
            {"min": 1, "median": "x", "mean": 2.0, "max": 3},
            "'lengths.median.int': Input should be",
        ),
        (
            "counts",
            {"users": 2, "items": 3, "events": 4},
            "'counts': users_with_one_event is None",
        ),
        ("counts", {"users": 0}, "'counts': users is 0, and is"),
        (
            "counts",
            {"users": True, "items": 3},
            "'counts.users': Input should be a valid integer, and is 'True'",
        ),
        ("has_ratings", 1, "'has_ratings': Input should be a valid boolean, and is '1'"),
        ("event_columns", [{"name": "x", "kind": "odd"}], "'event_columns.0.kind': String should match"),
        ("unknown", 1, "'unknown': Unexpected keyword argument, and is '1'"),
    ],
)
def test_a_manifest_without_its_numbers(folder: Path, field: str, value: dict, what: str) -> None:
    rewrite_manifest(folder, {field: value})
    message = error_of(folder)
    assert message.startswith(f"{folder / 'manifest.json'}: {what}") and message.endswith("; prepare the data again")


@pytest.mark.parametrize(
    "name", ["items.int32.bin", "ratings.float32.bin", "timestamps.int64.bin", "offsets.int64.bin"]
)
@pytest.mark.parametrize("change", [-4, 4])
def test_a_column_of_the_wrong_size(folder: Path, name: str, change: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:change] if change < 0 else data + b"0000")
    assert f"{name}: has {len(data) + change} bytes, the manifest says {len(data)}" in error_of(folder)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json", "items.int32.bin", "timestamps.int64.bin", "offsets.int64.bin", "items.parquet",
        "users.parquet",
    ],
)  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "cut short", "a pipe, which would block"])
def test_a_file_that_cannot_be_read(folder: Path, name: str, fault: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if fault == "cut short":
        (folder / name).write_bytes(data[:-15])
    elif fault != "missing":
        os.mkfifo(folder / name)
    message = error_of(folder)
    assert name in message or (name == "manifest.json" and "not a prepared folder" in message)


def test_tables_that_do_not_fit_the_counts(folder: Path) -> None:
    shutil.copy(folder / "users.parquet", folder / "items.parquet")
    assert "items.parquet: 2 rows, the manifest says 3" in error_of(folder)


def test_offsets_that_do_not_rise(folder: Path) -> None:
    np.array([0, 5, 4]).tofile(folder / "offsets.int64.bin")
    assert "offsets.int64.bin: damaged" in error_of(folder)


@pytest.mark.parametrize("name", ["items.int32.bin", "ratings.float32.bin", "timestamps.int64.bin"])
def test_verify_finds_a_changed_column(folder: Path, name: str) -> None:
    SequenceDataset.open(folder).verify()
    data = bytearray((folder / name).read_bytes())
    data[0] = 2 if data[0] != 2 else 3
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="does not match its hash"):
        SequenceDataset.open(folder).verify()


def test_verify_finds_changed_features(folder: Path) -> None:
    table = pq.read_table(folder / "items.parquet")
    genres = pa.array(["h", "g", "g"])
    pq.write_table(table.set_column(1, table.schema.field("genre"), genres), folder / "items.parquet")
    with pytest.raises(UserError, match="items.parquet: not the file that was prepared"):
        SequenceDataset.open(folder).verify()


def test_verify_finds_a_changed_description(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"cardinality": 2', '"cardinality": 3'))
    with pytest.raises(UserError, match="does not describe the items' features"):
        SequenceDataset.open(folder).verify()


def test_the_identity_of_features_is_not_the_splits(folder: Path) -> None:
    before = SequenceDataset.open(folder).manifest
    for changed in (
        dataclasses.replace(before, tables={**before.tables, "items.parquet": "0"}),
        dataclasses.replace(before, features=[dataclasses.replace(before.features[0], kind="text")]),
    ):
        assert changed.features_hash != before.features_hash
        assert changed.data_hash == before.data_hash


def test_a_folder_without_checksums_of_its_tables_is_read(folder: Path) -> None:
    rewrite_manifest(folder, {}, ["tables"])
    dataset = SequenceDataset.open(folder)
    dataset.verify()
    assert dataset.manifest.tables == {}
    assert dataset.original_item_ids().to_pylist() == ["x", "y", "z"]


@pytest.mark.parametrize("tables", [{"../outside": "0"}, {"items.parquet": "0", "users.parquet": 3}])
def test_checksums_of_other_files_are_refused(folder: Path, tables: dict) -> None:
    rewrite_manifest(folder, {"tables": tables})
    message = error_of(folder)
    assert "'tables" in message and "prepare the data again" in message


def test_verify_finds_ids_outside_the_catalogue(folder: Path) -> None:
    np.array([1, 1, 2, 4], np.int32).tofile(folder / "items.int32.bin")
    with pytest.raises(UserError, match="item ids outside 1..3"):
        SequenceDataset.open(folder).verify()


VALUES: list = [None, -1, 0, 10**30, 1.5, "x", [], {}, True, [{}], {"users": 1}, [{"name": 1}]]


def damage(rng: random.Random, text: str) -> bytes:
    """The manifest with a field replaced, or with bytes cut or changed."""
    if rng.random() < 0.5:
        settings = json.loads(text)
        target = (
            settings if rng.random() < 0.6 else rng.choice([v for v in settings.values() if isinstance(v, dict) and v])
        )
        key = rng.choice(list(target))
        target[key] = rng.choice(VALUES)
        return json.dumps(settings).encode()
    data = bytearray(text.encode())
    at = rng.randrange(len(data))
    data[at : at + rng.randint(0, 3)] = rng.choice([b"", b"\xff", b"9", b'"', b"{", b"[" * 3000])
    return bytes(data)


def fuzz_manifest(folder: Path, seed: int, count: int) -> int:
    """Open the folder with ``count`` damaged manifests; errors other than UserError escape. Returns those
    refused."""
    rng = random.Random(seed)
    path = folder / "manifest.json"
    text = path.read_text()
    refused = 0
    for _ in range(count):
        write(folder, damage(rng, text), path.name)
        try:
            dataset = SequenceDataset.open(folder)
            assert len(dataset.items) == 4
            dataset.item_features()
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    return refused


@memory_grows_at_most(256)
def test_fuzz(folder: Path) -> None:
    assert 300 < fuzz_manifest(folder, 5, 1_000) < 1_000


def everything(folder: Path) -> tuple:
    """All that the folder holds; what is read is what was prepared, or a UserError."""
    dataset = SequenceDataset.open(folder)
    dataset.verify()
    columns = [column.tolist() for column in (dataset.items, dataset.ratings, dataset.timestamps)]
    ids = dataset.original_user_ids().to_pylist(), dataset.original_item_ids().to_pylist()
    features = dataset.item_features()
    return columns, ids, len(features) if features is not None else 0


def fuzz_files(folder: Path, seed: int, count: int) -> int:
    """Read the folder with one of its files damaged, ``count`` times; returns how often it was refused."""
    rng, whole = random.Random(seed), everything(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    refused = 0
    for _ in range(count):
        path = folder / rng.choice(names)
        before = path.read_bytes()
        data = bytearray(before)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            length = rng.choice([0, 1, 1, 1, 2])
            data[at : at + length] = bytes(rng.randrange(256) for _ in range(length))
        write(folder, bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data), path.name)
        try:
            assert everything(folder) == whole
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        write(folder, before, path.name)
    assert everything(folder) == whole
    return refused


@memory_grows_at_most(256)
def test_fuzz_of_the_files(folder: Path) -> None:
    assert 200 < fuzz_files(folder, 7, 1_000) < 1_000


@pytest.mark.slow
def test_fuzz_of_the_files_at_length(folder: Path) -> None:
    inputs = int(os.environ.get("FUZZ_INPUTS", "100000"))
    assert 0 < fuzz_files(folder, 8, inputs) < inputs


@pytest.mark.parametrize("name", ["users.parquet", "items.parquet"])
def test_columns_whose_names_are_no_text(folder: Path, name: str) -> None:
    column = name.removesuffix("s.parquet").encode()
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(column, column[:-1] + b"\x95"))
    with pytest.raises(UserError, match=f"{name}: missing, damaged or cut short|{name}: column") as refused:
        everything(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_fuzz_at_length(folder: Path) -> None:
    inputs = int(os.environ.get("FUZZ_INPUTS", "100000"))
    assert 0 < fuzz_manifest(folder, 6, inputs) < inputs


def test_verify_in_parts(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    dataset = SequenceDataset.open(folder)
    for events in (1, 3):
        monkeypatch.setattr("generative_recommenders.data.store.VERIFY_EVENTS", events)
        dataset.verify()
    times = np.array(dataset.timestamps)
    times[-1] += 1  # in the last part
    with pytest.raises(UserError, match="does not match its hash"):
        dataclasses.replace(dataset, timestamps=times).verify()


def test_a_manifest_without_measure_is_refused_unread(folder: Path) -> None:
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(1 << 30)
    with memory_grows_at_most(32):
        assert "longer than" in error_of(folder)


def test_a_table_that_unpacks_without_measure_is_refused(folder: Path) -> None:
    ids = pa.array(["x" * 500_000]).take(pa.array([0] * 100))
    with pq.ParquetWriter(folder / "items.parquet", pa.schema([("item", pa.string())]), compression="zstd") as writer:
        for _ in range(2):
            writer.write_table(pa.table({"item": ids}))
    assert (folder / "items.parquet").stat().st_size < 100 << 10  # so that 64 MiB and 300 times this are passed
    with pytest.raises(UserError, match="it unpacks to more than 300 times its size"):
        read_rows(folder / "items.parquet", ["item"], 200)


def test_a_pipe_for_a_vocabulary_is_refused_at_once(tmp_path: Path) -> None:
    dataset = dataset_of({"user": "aa", "item": "xy", "shelf": "st"}, tmp_path / "out")
    (tmp_path / "out" / "event.shelf.parquet").unlink()
    os.mkfifo(tmp_path / "out" / "event.shelf.parquet")
    with pytest.raises(UserError, match="prepare the data again"):
        dataset.vocabulary("shelf")


@pytest.fixture
def with_unrated(tmp_path: Path) -> Path:
    """Four items, of which two are rated; ids in UTF-8 order within each kind. A feature without an item is none's."""
    columns = {"user": "aaa", "item": "yxy"}
    features = pa.table({"item": ["z", "y", "w", "x", None], "genre": ["g", "h", "g", "h", "none"]})
    dataset_of(columns, tmp_path / "filtered", item_features=features, filter="k_core:1")
    dataset_of(columns, tmp_path / "fewer", item_features=features.slice(0, 2))
    return dataset_of(columns, tmp_path / "plain", item_features=features).folder


def test_items_without_ratings_come_after_the_rated_ones(with_unrated: Path) -> None:
    rated = SequenceDataset.open(with_unrated)
    rated.verify()
    whole = rated.with_catalogue("all")
    assert rated.with_catalogue("rated") is rated
    assert (rated.num_items, whole.num_items, whole.num_users) == (2, 4, 1)
    assert rated.original_item_ids().to_pylist() == ["x", "y"]
    assert whole.original_item_ids().to_pylist() == ["x", "y", "w", "z"]
    assert whole.item_features()["genre"].to_pylist() == ["h", "h", "g", "g"]
    assert whole.items.tolist() == rated.items.tolist() == [2, 1, 2]


def test_items_without_ratings_are_in_no_hash(with_unrated: Path) -> None:
    some, more = (SequenceDataset.open(with_unrated.parent / name).manifest for name in ("fewer", "plain"))
    assert (some.counts["unrated_items"], more.counts["unrated_items"]) == (1, 2)
    assert (some.data_hash, some.split_hashes) == (more.data_hash, more.split_hashes)


def test_items_that_a_filter_left_out_are_no_candidates(with_unrated: Path) -> None:
    filtered = SequenceDataset.open(with_unrated.parent / "filtered").with_catalogue("all")
    assert filtered.num_items == 2


def test_a_folder_that_kept_no_items_without_ratings_says_so(with_unrated: Path) -> None:
    counts, tables = (dict(getattr(read_manifest(with_unrated), name)) for name in ("counts", "tables"))
    del counts["unrated_items"], tables["unrated_items.parquet"]
    rewrite_manifest(with_unrated, {"counts": counts, "tables": tables})
    old = SequenceDataset.open(with_unrated)
    old.verify()
    with pytest.raises(UserError, match="prepared by a release that kept no items without ratings"):
        old.with_catalogue("all")


def test_a_changed_table_of_items_without_ratings_is_found(with_unrated: Path) -> None:
    table = pq.read_table(with_unrated / "unrated_items.parquet")
    pq.write_table(table.slice(1), with_unrated / "unrated_items.parquet")
    assert "1 rows, the manifest says 2" in error_of(with_unrated)
    pq.write_table(table.take([1, 0]), with_unrated / "unrated_items.parquet")
    with pytest.raises(UserError, match="unrated_items.parquet: not the file that was prepared"):
        SequenceDataset.open(with_unrated).verify()
