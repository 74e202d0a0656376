"""The exchange format out and in, and exports as Parquet."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from generative_recommenders.data import export
from generative_recommenders.data.export import export_parquet, export_text
from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.prepare import DEFAULT_MEMORY_LIMIT, prepare
from generative_recommenders.data.readers import text as delimited_text
from generative_recommenders.data.readers.events import EventReader, ReadOptions
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from memory import memory_grows_at_most
from ratings_files import write
from tiny_data import dataset_of

HEADER = "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\n"


EXCHANGE = ReadOptions(exchange=True, time_unit="s")


def import_text(
    path: Path, out: Path, name: str, memory_limit: int = DEFAULT_MEMORY_LIMIT, k_core: int | None = None
) -> Manifest:
    raw = resolve("exchange-text", raw_path=path, data_root=out.parent, k_core=k_core, result_name=name)
    return prepare(raw, out, memory_limit)


IDS = {"user": ["u,1", "u,1", "v", "u,1"], "item": ["b", 'a"', "b", "c"]}


def test_export_is_what_hstu_users_read(tmp_path: Path) -> None:
    dataset = dataset_of({**IDS, "rating": [5, 4, 3, 2], "timestamp": [30, 20, 10, 25]}, tmp_path / "out")
    export_text(dataset, tmp_path / "text" / "s.csv")
    assert (tmp_path / "text" / "s.csv").read_text() == (
        HEADER + '0,0,"1,3,2","4.0,2.0,5.0","20,25,30"\n' + '1,1,"2","3.0","10"\n'
    )
    assert [p.name for p in (tmp_path / "text").iterdir()] == ["s.csv"]


@pytest.mark.parametrize("events_at_once", [1, 100])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rating": [5, 4.5, 3, 2]},
        {"timestamp": [3, 2, 1, 2]},
        {"rating": [1, 2, 3, 4], "timestamp": [3, 2, 1, 2]},
    ],
)
def test_round_trip(tmp_path: Path, extra: dict, events_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EVENTS_AT_ONCE", events_at_once)
    dataset = dataset_of({**IDS, **extra}, tmp_path / "out")
    export_text(dataset, tmp_path / "s.csv")
    import_text(tmp_path / "s.csv", tmp_path / "back", "back")
    back = SequenceDataset.open(tmp_path / "back")
    ids = back.original_item_ids().to_pylist()
    assert [int(ids[i - 1]) for i in back.items] == dataset.items.tolist()
    assert back.original_user_ids().to_pylist() == ["0", "1"]
    assert back.offsets.tolist() == dataset.offsets.tolist()
    for ours, theirs in ((dataset.ratings, back.ratings), (dataset.timestamps, back.timestamps)):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or ours.tolist() == theirs.tolist()


def test_ids_become_original_ids_in_text_order(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(HEADER.strip() + '\r\n0,7,"10,9,10","5.0,4.0,3","1,2,3"\r\n1,8,3,1,9\r\n')
    import_text(tmp_path / "s.csv", tmp_path / "out", "t")
    dataset = SequenceDataset.open(tmp_path / "out")
    assert dataset.original_item_ids().to_pylist() == ["10", "3", "9"]
    assert dataset.items.tolist() == [1, 3, 1, 2]


def test_k_core_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(HEADER + '0,7,"1,2,3","1,1,1","1,2,3"\n1,8,"1,2","1,1","1,2"\n2,9,1,1,1\n')
    manifest = import_text(tmp_path / "s.csv", tmp_path / "out", "t", k_core=2)
    assert (manifest.filter, manifest.counts["users"], manifest.counts["events"]) == ("k_core:2", 2, 4)


@pytest.mark.parametrize("zeros", ["", "ratings", "timestamps"])
def test_beyond_the_memory_limit_events_go_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, zeros: str
) -> None:
    """The same folder, whatever the limit; one block of lines at a time is held."""
    lines = []
    for user in range(300):
        items = [str(user * step % 17 + 1) for step in range(1, user % 7 + 2)]
        ratings = ["0" if zeros == "ratings" else item for item in items]
        times = ["0" if zeros == "timestamps" else str(step) for step, _ in enumerate(items)]
        lines.append(f'{user},{user},"{",".join(items)}","{",".join(ratings)}","{",".join(times)}"\n')
    (tmp_path / "s.csv").write_text(HEADER + "".join(lines))
    monkeypatch.setattr(delimited_text, "BLOCK_BYTES", 2_000)
    said = "events are kept in files"
    with caplog.at_level(logging.INFO, logger="absl"):
        inside = import_text(tmp_path / "s.csv", tmp_path / "inside", "t")
        assert said not in caplog.text
        outside = import_text(tmp_path / "s.csv", tmp_path / "outside", "t", memory_limit=60_000)
        assert said in caplog.text
    assert inside == outside
    SequenceDataset.open(tmp_path / "outside").verify()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('1,1,"1,2","1","1,2"', "the lists have 2, 1 and 2 entries"),
        ('1,1,"1,x","1,2","1,2"', "the item 'x' is not a whole number"),
        ('1,1,"1,-2","1,2","1,2"', "the item '-2'"),
        ('1,1,"1,2","1,nan","1,2"', "the rating 'nan' is missing"),
        ('1,1,"1,2","1,2","1,-2"', "the timestamp '-2' is before 1970"),
        ('1,1,"1,2","1,2","1,1400000000000"', "after the year 2200 in seconds"),
        ('1,1,"","",""', "the item '' is not a whole number"),
        ("1,1,2", "3 fields where 5 are expected"),
        ('1,,"1","1","1"', "the user '' is missing"),
        ('1,1,"__import__(\'os\')","1","1"', "is not a whole number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(HEADER + '0,0,"1,2","1,2","1,2"\n' + line + "\n")
    with pytest.raises(UserError, match="line 3: ") as caught:
        import_text(path, tmp_path / "out", "t")
    assert what in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_wrong_header_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    for text, what in [("a,b\n1,2\n", "line 1: not the exchange format"), (HEADER, "empty"), ("", "empty")]:
        path.write_text(text)
        with pytest.raises(UserError, match=what):
            import_text(path, tmp_path / "out", "t")


def fuzz(folder: Path, seed: int, count: int) -> int:
    """Import ``count`` damaged files; errors other than UserError escape. Returns those refused."""
    rng = random.Random(seed)
    data = (HEADER + '0,0,"1,2,3","5,4.5,3","10,20,30"\n1,1,"2","3","40"\n').encode()
    refused = 0
    for _ in range(count):
        at = rng.randrange(len(data))
        piece = rng.choice([b"", b'"', b",", b"\n", b"-", b"\xff", b"\0", b"9", b"e9", b"nan", b"\r"])
        path = write(folder, data[:at] + piece + data[at + rng.randint(0, 2) :])
        try:
            assert sum(table.num_rows for table in EventReader([path], EXCHANGE).batches()) > 0
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    return refused


@memory_grows_at_most(256)
def test_fuzz(tmp_path: Path) -> None:
    assert 100 < fuzz(tmp_path, 3, 1_000) < 1_000


@pytest.mark.slow
def test_fuzz_at_length(tmp_path: Path) -> None:
    inputs = int(os.environ.get("FUZZ_INPUTS", "100000"))
    assert 0 < fuzz(tmp_path, 4, inputs) < inputs


def test_a_line_break_inside_quotes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(HEADER + '0,"a\nb","1","1","1"\n')
    with pytest.raises(UserError, match="line 2: "):
        import_text(tmp_path / "s.csv", tmp_path / "out", "t")


def test_what_the_format_cannot_hold_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of({**IDS, "rating": [0, 0, 0, 0], "timestamp": [3, 2, 1, 2]}, tmp_path / "out")
    export_text(dataset, tmp_path / "s.csv")
    assert caplog.messages == [f"{tmp_path / 's.csv'}: all ratings are zero; the exchange format reads that as none"]
    caplog.clear()
    counts = {**dataset.manifest.counts, "items": 5}
    larger = dataclasses.replace(dataset, manifest=dataclasses.replace(dataset.manifest, counts=counts))
    export_text(dataclasses.replace(larger, ratings=None), tmp_path / "s.csv")
    assert caplog.messages == [f"{tmp_path / 's.csv'}: 2 items of the catalogue have no event and are not in it"]


@pytest.mark.filterwarnings("error")
def test_very_large_ratings_come_back(tmp_path: Path) -> None:
    dataset = dataset_of({**IDS, "rating": [1e30, -3e38, 2, float(2**53)]}, tmp_path / "out")
    assert dataset.ratings is not None
    export_text(dataset, tmp_path / "s.csv")
    import_text(tmp_path / "s.csv", tmp_path / "back", "back")
    ratings = SequenceDataset.open(tmp_path / "back").ratings
    assert ratings is not None and ratings.tolist() == dataset.ratings.tolist()


@pytest.mark.parametrize("export", [export_text, export_parquet])
@pytest.mark.parametrize("name", ["", ".", "r.csv/x", "n" * 250])
def test_a_place_that_cannot_be_written_reports_one_line_error(
    tmp_path: Path, export: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.csv").touch()
    with pytest.raises(UserError) as caught:
        export(dataset_of(IDS, tmp_path / "out"), name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.csv"]
