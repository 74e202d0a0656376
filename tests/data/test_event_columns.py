"""Further event columns: read, prepared, hashed, exported and batched by their kind alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from generative_recommenders.data.export import export_parquet
from generative_recommenders.data.loader import EvaluationLoader, SequenceLoader
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from tiny_data import rewrite_manifest

EVENTS = """user,item,genre,progress,seen_at,when
u1,a,x,0.5,1970-01-02,30
u1,b,,1.5,,10
u2,c,y,,1970-01-08,20
u1,c,x,2.5,1970-01-03,20
u2,a,é,0.5,1970-01-02,40
"""
COLUMNS = "user,item,shelf=genre:categorical,progress:numerical,seen_at:time,timestamp=when"


def prepared(folder: Path, text: str = EVENTS, columns: str = COLUMNS, memory: int = 1 << 30) -> SequenceDataset:
    folder.mkdir(exist_ok=True)
    (folder / "r.csv").write_text(text)
    prepare(RawRatings("t", [folder / "r.csv"], ReadOptions(columns)), folder / "out", memory)
    dataset = SequenceDataset.open(folder / "out")
    dataset.verify()
    return dataset


@pytest.mark.parametrize("memory", [1 << 30, 200])
def test_columns_follow_their_events(tmp_path: Path, memory: int) -> None:
    dataset = prepared(tmp_path, memory=memory)
    assert dataset.vocabulary("shelf").to_pylist() == ["x", "y", "é"]
    assert dataset.extra["shelf"].tolist() == [0, 1, 1, 2, 3]
    np.testing.assert_array_equal(dataset.extra["progress"], np.float32([1.5, 2.5, 0.5, np.nan, 0.5]))
    assert dataset.extra["seen_at"].tolist() == [0, 172_800, 86_400, 604_800, 86_400]
    shelf, progress, _ = dataset.manifest.event_columns
    assert (shelf.cardinality, progress.mean) == (3, 1.25)
    assert "shelf (categorical of 3), progress (numerical), seen_at (time)" in summary(dataset.manifest)


@pytest.mark.parametrize("shelves", [["", "x", "y", "", "x"], ["", "", "y", "x"], ["y", "", "x"], ["", ""]])
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_categories_that_are_missing_throughout_a_part(tmp_path: Path, shelves: list[str], memory: int) -> None:
    header = "user,item,shelf\n"
    for number, shelf in enumerate(shelves):
        (tmp_path / f"{number}.csv").write_text(f"{header}u,i{number},{shelf}\n")
    (tmp_path / "last.csv").write_text(f"{header}NA,i,x\n")
    options = ReadOptions("user,item,shelf:categorical", drop_missing=True)
    prepare(RawRatings("t", sorted(tmp_path.glob("*.csv")), options), tmp_path / "out", memory)
    dataset = SequenceDataset.open(tmp_path / "out")
    names = ["", *dataset.vocabulary("shelf").to_pylist()]
    assert [names[number] for number in dataset.extra["shelf"]] == shelves


def test_data_hash_knows_known_columns_alone(tmp_path: Path) -> None:
    with_columns = prepared(tmp_path / "one").manifest
    without = prepared(tmp_path / "two", columns="user,item,timestamp=when").manifest
    assert with_columns.data_hash == without.data_hash
    assert with_columns.split_hashes == without.split_hashes
    assert without.columns_hash == "" != with_columns.columns_hash


@pytest.mark.parametrize(("old", "new"), [("a,x,", "a,y,"), ("2.5", "2.0"), ("01-03", "01-04"), ("b,,", "b,x,")])
def test_columns_hash_knows_every_value(tmp_path: Path, old: str, new: str) -> None:
    first = prepared(tmp_path / "one").manifest
    second = prepared(tmp_path / "two", EVENTS.replace(old, new)).manifest
    assert first.columns_hash != second.columns_hash
    assert first.data_hash == second.data_hash


@pytest.mark.parametrize("file", ["event.shelf.int32.bin", "event.progress.float32.bin", "event.seen_at.int64.bin"])
def test_changed_values_are_found(tmp_path: Path, file: str) -> None:
    dataset = prepared(tmp_path)
    path = dataset.folder / file
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its hash"):
        SequenceDataset.open(dataset.folder).verify()
    path.write_bytes(bytes(data)[:-1])
    with pytest.raises(UserError, match="the folder is damaged"):
        SequenceDataset.open(dataset.folder)


def test_export_and_import_keep_everything(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "one")
    path = tmp_path / "events.parquet"
    export_parquet(dataset, path)
    assert pq.read_table(path)["shelf"].to_pylist() == [None, "x", "x", "y", "é"]
    columns = "user,item,timestamp,shelf:categorical,progress:numerical,seen_at:time"
    manifest = prepare(RawRatings("t", [path], ReadOptions(columns)), tmp_path / "back")
    assert manifest.event_columns == dataset.manifest.event_columns
    assert (manifest.data_hash, manifest.columns_hash) == (
        dataset.manifest.data_hash,
        dataset.manifest.columns_hash,
    )


def test_batches_hold_them_scaled_with_fill_zero(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    loader = SequenceLoader(dataset, make_split(dataset, "paper").train_stops, 3, 8, seed=0)
    batch = loader.batch(np.array([0]), 0, 0).columns
    assert batch["shelf"].tolist() == [[0, 1, 0, 0]]
    std = dataset.manifest.event_columns[1].std
    torch.testing.assert_close(batch["progress"], torch.tensor([[0.25 / std, 1.25 / std, 0.0, 0.0]]))
    split = make_split(dataset, "paper")
    test = next(iter(EvaluationLoader(dataset, split.test_targets, 3, 8)))
    assert test["target_shelf"].tolist() == [1, 3]
    assert test["shelf"].tolist() == [[0, 1, 0], [2, 0, 0]]


@pytest.mark.parametrize("name", ["lengths", "ratings", "past_x", "target_x", "a-b"])
def test_names_that_batches_use_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"cannot be called '{name}'"):
        prepared(tmp_path, columns=f"user,item,{name}=genre:categorical,timestamp=when")


def test_version_1_is_read(tmp_path: Path) -> None:
    folder = prepared(tmp_path, columns="user,item,timestamp=when").folder
    rewrite_manifest(folder, {"version": 1}, ("event_columns", "columns_hash", "statistics", "choices"))
    dataset = SequenceDataset.open(folder)
    dataset.verify()
    assert not dataset.manifest.event_columns and dataset.num_items == dataset.items.max()


@pytest.mark.parametrize(
    "change",
    [{"kind": "id"}, {"name": "../x"}, {"std": 0.0}, {"cardinality": -1}, {"mean": "a"}, {"more": 1}],
)
def test_damaged_descriptions_are_refused(tmp_path: Path, change: dict) -> None:
    dataset = prepared(tmp_path)
    shelf, *others = map(dataclasses.asdict, dataset.manifest.event_columns)
    rewrite_manifest(dataset.folder, {"event_columns": [shelf | change, *others]})
    with pytest.raises(UserError, match=r"event_columns.0.*; prepare the data again"):
        SequenceDataset.open(dataset.folder)
