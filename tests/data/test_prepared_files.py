"""Files that preparation leaves on disk, when it succeeds and when it fails."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from generative_recommenders.data.preparation import columns
from generative_recommenders.data.preparation import prepare as preparation
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.statistics import summary
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from ratings_files import COMMAS, prepare_rows, write_csv


def test_expected_counts_name_both_numbers(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [("u", "a", 1.0, 1)])
    raw = RawRatings("ml", [path], COMMAS, expected_items=3706)
    with pytest.raises(UserError, match="1 items after preparation where 3706 are expected"):
        prepare(raw, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_a_failed_run_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    good = write_csv(tmp_path / "good.csv", [("u", "a", 1.0, 1)])
    bad = tmp_path / "bad.csv"
    bad.write_text("u,a,1,1\nu,a,x,1\n")
    prepare(RawRatings("t", [good], COMMAS), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"bad.csv, line 2: the rating 'x' is not a number"):
        prepare(RawRatings("t", [bad], COMMAS), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "good.csv", "out"]


def test_success_replaces_the_old_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        path = write_csv(tmp_path / "r.csv", [("u", name, 1.0, 1)])
        prepare(RawRatings(name, [path], COMMAS), tmp_path / "out")
    assert SequenceDataset.open(tmp_path / "out").manifest.name == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.csv"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a prepared folder"):
        prepare_rows([("u", "a", 1.0, 1)], tmp_path)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / f".out.tmp-{socket.gethostname()}-999999999"
    leftover.mkdir()
    (leftover / "items.int32.bin").write_bytes(b"half")
    elsewhere = tmp_path / ".out.tmp-another.host-999999999"
    elsewhere.mkdir()
    prepare_rows([("u", "a", 1.0, 1)], tmp_path)
    assert not leftover.exists()
    assert elsewhere.exists()  # its process cannot be seen from here


def test_leftovers_of_a_file_are_removed_whatever_its_name(tmp_path: Path) -> None:
    leftover = tmp_path / f".events[1].csv.tmp-{socket.gethostname()}-999999999"
    leftover.write_bytes(b"half")
    with new_file(tmp_path / "events[1].csv") as scratch:
        scratch.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["events[1].csv"]


def test_a_link_to_a_file_keeps_leading_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "there" / "events.csv")
    with new_file(tmp_path / "link.csv") as scratch:
        scratch.write_bytes(b"whole")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "there" / "events.csv").read_bytes() == b"whole"


def test_a_folder_made_meanwhile_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    target = tmp_path / "events.csv"
    with pytest.raises(UserError, match="cannot be written"), new_file(target) as scratch:
        scratch.write_bytes(b"whole")
        target.mkdir()
        (target / "notes.txt").write_text("precious")
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_a_folder_that_is_being_written_is_no_prepared_data(tmp_path: Path) -> None:
    for name in (".a.tmp-host-1", "b", "a"):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        (tmp_path / "prepared" / name / "manifest.json").write_text("{}")
    assert preparation.prepared_names(tmp_path) == ["a", "b"]


def test_an_odd_name_is_named_without_a_flag() -> None:
    with pytest.raises(UserError, match=r"the name '../x' of a data set must consist of letters"):
        preparation.prepared_path("data", "../x")


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [("u", "a", 1.0, 1)])
    raw = RawRatings("t", [path], COMMAS, source={"sha256": "ab", "url": "https://x"})
    prepare(raw, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert stored["source"] == {"sha256": "ab", "url": "https://x"}
    assert stored["version"] == 2


def test_a_full_disk_reports_one_line_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns, "write_manifest", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        prepare_rows([("u", "a", 1.0, 1)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_a_disk_that_fills_with_columns_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "column_file", lambda *_: Path("/dev/full"))
    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        prepare_rows([(f"u{i}", "a", 1.0, 1) for i in range(9_000)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


@pytest.mark.parametrize("timed", [True, False])
def test_the_hash_of_every_split_is_stored_and_printed(tmp_path: Path, timed: bool) -> None:
    path = write_csv(tmp_path / "r.csv", [("u", item, 1.0, 1) for item in "abcd"])
    columns = "user,item,rating," + ("timestamp" if timed else "_")
    options = ReadOptions(columns, ",", header=False)
    manifest = prepare(RawRatings("t", [path], options), tmp_path / "out")
    dataset = SequenceDataset.open(tmp_path / "out")
    protocols = ["leave_one_out", "paper", *["global_time"] * timed]
    assert dataset.manifest.split_hashes == {name: make_split(dataset, name).hash for name in protocols}
    for name, text in manifest.split_hashes.items():
        assert f"split hash, {name}:" in summary(manifest) and text in summary(manifest)


def test_a_name_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"r\xff.csv")
    path.write_text("user,item\nu,a\n")
    prepare(resolve("csv", raw_path=path, data_root=tmp_path), tmp_path / "out")
    assert SequenceDataset.open(tmp_path / "out").manifest.source["input"] == path.name


def test_a_target_that_is_too_long_reports_one_line_error(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [("u", "a", 1.0, 1)])
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        prepare(RawRatings("t", [path], COMMAS), tmp_path / ("n" * 300))
    with pytest.raises(UserError, match="not a prepared folder"):
        SequenceDataset.open(tmp_path / ("n" * 300))
