"""The audit of a prepared data set: its numbers, and its three files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from generative_recommenders.commands import audit
from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.statistics import event_columns, length_curve, popularity_curve, timeline
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation import order_dependence as dependence
from generative_recommenders.evaluation.order_dependence import of_users, order_dependence, shuffled
from ratings_files import PAIRS
from tiny_data import tiny_dataset

KINDS = "user,item,rating,timestamp,shelf:categorical,progress:numerical,seen:time"


def columns_dataset(folder: Path) -> SequenceDataset:
    rng = np.random.default_rng(0)
    lines = [
        f"u{u},i{rng.integers(30)},{rng.integers(1, 6)},{1_500_000_000 + 1000 * u + t},"
        f"{rng.choice(['a', 'b', ''], p=[0.6, 0.2, 0.2])},{rng.random() if t % 2 else ''},{1_400_000_000 + t}\n"
        for u in range(20)
        for t in range(12)
    ]
    (folder / "r.csv").write_text("".join(lines))
    options = ReadOptions(KINDS, ",", header=False)
    prepare(RawRatings("kinds", [folder / "r.csv"], options), folder / "prepared" / "kinds")
    return SequenceDataset.open(folder / "prepared" / "kinds")


def test_curves_are_those_of_the_data(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2, 3, 1], [1, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    lengths = length_curve(dataset)
    assert lengths["quantiles"]["0.5"] == 4
    assert lengths["share_of_users_with_at_least"] == {"1": 1.0, "2": 1.0, "4": 2 / 3, "8": 1 / 3}
    popularity = popularity_curve(dataset)
    assert popularity["events_by_rank"] == {"1": 5, "2": 2, "3": 2, **dict.fromkeys("45678", 1)}
    assert popularity["share_of_events_of_the_top"]["0.5"] == 10 / 14
    counts = np.sort([5, 2, 2, 1, 1, 1, 1, 1])
    gini = 2 * (counts * np.arange(1, 9)).sum() / (8 * counts.sum()) - 9 / 8
    assert popularity["gini"] == pytest.approx(gini)
    assert popularity["items_with_fewer_than_5_events"] == 7


def test_leakage_in_time_is_the_share_of_later_training_events(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [(u, i, int(t)) for u in range(30) for i, t in enumerate(rng.integers(0, 500, 9))]
    (tmp_path / "r.csv").write_text("".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    options = ReadOptions("user,item,timestamp", ",", header=False)
    prepare(RawRatings("t", [tmp_path / "r.csv"], options), tmp_path / "out")
    dataset = SequenceDataset.open(tmp_path / "out")
    found = timeline(dataset, make_split(dataset))
    assert found is not None
    times = np.sort(np.array([t for _, _, t in rows]).reshape(30, 9), axis=1)
    later = [(times[:, :7] > target).mean() for target in times[:, 8]]
    assert found["training_later_than_test"] == pytest.approx(np.mean(later), abs=1e-9)
    assert {name: sum(counts) for name, counts in found["events"].items()} == {
        "training": 210,
        "validation": 30,
        "test": 30,
    }
    assert found["quantiles"]["test"]["1"].startswith("1970-01-01 00:0")


def test_all_columns_of_the_events_are_described(tmp_path: Path) -> None:
    described = {each["name"]: each for each in event_columns(columns_dataset(tmp_path))}
    assert list(described) == ["rating", "timestamp", "shelf", "progress", "seen"]
    assert described["rating"]["quantiles"]["1"] == 5
    assert described["timestamp"]["missing"] == 0
    assert (described["shelf"]["values"], described["shelf"]["most_frequent"]) == (2, "a")
    assert 0.1 < described["shelf"]["missing"] < 0.3
    assert described["progress"]["missing"] == 0.5
    assert described["seen"]["quantiles"]["0"] == "2014-05-13 16:53:20"


def cycle(folder: Path, in_order: bool, users: int = 200) -> SequenceDataset:
    """Users who read on along one circle of 40 items, or draw from it."""
    rng = np.random.default_rng(1)
    start = rng.integers(0, 40, users)
    steps = np.arange(8) if in_order else rng.permuted(np.tile(np.arange(40), (users, 1)), axis=1)[:, :8]
    items = ((start[:, None] + steps) % 40 + 1).tolist()
    return tiny_dataset(folder, [list(range(1, 41)), *items])


@pytest.mark.parametrize("in_order", [True, False])
def test_order_matters_where_the_next_item_follows_from_the_last(tmp_path: Path, in_order: bool) -> None:
    found = order_dependence(cycle(tmp_path, in_order), steps=60)
    assert (found.users, found.sampled, found.seen_filter) == (201, False, "history")
    for name in ("last item's successor", "SASRec"):
        scores = found.scores[name]
        if in_order:
            assert scores["true"] > 0.9
            assert scores["shuffled"] < 0.6
        else:
            assert abs(scores["true"] - scores["shuffled"]) < 0.1
    popular = found.scores["most popular"]
    assert popular["true"] == pytest.approx(popular["shuffled"])


def test_users_are_sampled_and_their_items_numbered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = cycle(tmp_path, in_order=True)
    monkeypatch.setattr(dependence, "MOST_EVENTS", 5)
    some = of_users(dataset, np.array([0, 7]))
    assert some.offsets.tolist() == [0, 5, 10]
    known = sorted({*range(36, 41), *dataset.items[dataset.offsets[7] :][3:8].tolist()})
    assert [known[item - 1] for item in some.items[:5]] == list(range(36, 41))
    split = make_split(some)
    mixed = shuffled(some, split, np.random.default_rng(0))
    for user in range(2):
        events = slice(5 * user, 5 * user + 5)
        assert mixed.items[events][-1] == some.items[events][-1]
        assert sorted(mixed.items[events]) == sorted(some.items[events])
    assert mixed.items.tolist() != some.items.tolist()
    monkeypatch.setattr(dependence, "MOST_USERS", 50)
    found = order_dependence(dataset, steps=1)
    assert (found.users, found.sampled) == (50, True)


def test_text_json_and_png_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = columns_dataset(tmp_path)
    monkeypatch.setattr(dependence, "STEPS", 3)
    text = audit.write_audit(dataset.folder)
    names = sorted(path.name for path in dataset.folder.parent.iterdir())
    assert names == ["kinds", "kinds.audit.json", "kinds.audit.png", "kinds.audit.txt"]
    found = json.loads((dataset.folder.parent / "kinds.audit.json").read_text())
    assert found["data_hash"] == dataset.manifest.data_hash
    assert found["order"]["seen_filter"] == "none"  # of 30 items most come again
    assert (dataset.folder.parent / "kinds.audit.png").read_bytes().startswith(b"\x89PNG")
    for part in ("leakage in time", "column shelf (categorical)", "does order matter?", "Gini", "SASRec"):
        assert part in text
    audit.write_audit(dataset.folder, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "kinds.audit.txt").is_file()
    monkeypatch.setattr(audit, "order_dependence", None)  # refused before anything is computed
    with pytest.raises(UserError, match="not a folder"):
        audit.write_audit(dataset.folder, tmp_path / "r.csv")


def test_data_without_times_or_targets_is_audited_too(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("u a\nu b\nv a\n")
    prepare(RawRatings("short", [tmp_path / "r.txt"], PAIRS), tmp_path / "short")
    text = audit.write_audit(tmp_path / "short")
    assert "times: none" in text
    assert "no user has a test target" in text
    with pytest.raises(UserError, match="no user has three events"):
        order_dependence(dataclasses.replace(SequenceDataset.open(tmp_path / "short")))
