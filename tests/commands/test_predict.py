"""main.py --mode=predict on a run of release 0.1.0 and the data that it was trained on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from generative_recommenders import Recommender
from generative_recommenders.commands.predict import _ids, predict
from generative_recommenders.commands.setup import Options
from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from programs import run_program
from recommender_runs import MOL, make_run

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(RELEASE / "prepared", tmp_path / "data" / "prepared")
    shutil.copytree(RELEASE / "runs" / "sasrec", tmp_path / "run")
    return tmp_path


def run(folder: Path, output: str, *flags: str):
    return run_program(
        "main.py", "--mode=predict", f"--run_dir={folder / 'run'}", f"--data_root={folder / 'data'}",
        f"--output={folder / output}", *flags,
    )  # fmt: skip


def test_every_user_is_answered_as_by_the_recommender(folder: Path) -> None:
    done = run(folder, "recs.parquet", "--top_k=5")
    assert done.returncode == 0, done.stderr
    written = pd.read_parquet(folder / "recs.parquet")
    assert written.groupby("user_id").size().tolist() == [5] * 80
    events = pd.read_csv(RELEASE / "ratings.csv.gz").rename(columns={"user": "user_id", "item": "item_id"})
    own = Recommender.load(folder / "run").recommend(events[events["user_id"] == "reader-007"], k=5)
    theirs = written[written["user_id"] == "reader-007"]
    assert theirs["item_id"].tolist() == own["item_id"].tolist()
    assert theirs["score"].tolist() == pytest.approx(own["score"].tolist(), abs=1e-5)
    history = set(events[events["user_id"] == "reader-007"]["item_id"])
    assert not history & set(theirs["item_id"])


def test_some_users_candidates_and_text(folder: Path) -> None:
    (folder / "users.txt").write_text("reader-003\nnobody\nreader-003\n", encoding="utf-8-sig")
    (folder / "items.txt").write_text("book-001\nbook-002\n")
    flags = (
        f"--users={folder / 'users.txt'}",
        f"--candidates={folder / 'items.txt'}",
        "--noexclude_seen",
        "--history=test",
    )
    done = run(folder, "recs.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"recommendations for 1 users in .*recs\.jsonl, after \d+\.\d s", done.stderr)
    rows = [json.loads(line) for line in (folder / "recs.jsonl").read_text().splitlines()]
    assert {row["user_id"] for row in rows} == {"reader-003"}
    assert {row["item_id"] for row in rows} == {"book-001", "book-002"} and [row["rank"] for row in rows] == [
        1,
        2,
    ]
    assert run(folder, "recs.csv", *flags).returncode == 0
    assert pd.read_csv(folder / "recs.csv")["item_id"].tolist() == [row["item_id"] for row in rows]
    # what was written can be asked for again
    again = (f"--users={folder / 'recs.csv'}", f"--candidates={folder / 'recs.csv'}", *flags[2:])
    assert run(folder, "again.parquet", *again).returncode == 0
    assert pd.read_parquet(folder / "again.parquet")["item_id"].tolist() == [row["item_id"] for row in rows]


def prepared(events: pd.DataFrame, folder: Path) -> SequenceDataset:
    """``user_id``, ``item_id`` and further columns as a data set; one that is there is replaced."""
    types = {"timestamp": pa.int64(), "rating": pa.float32(), "progress": pa.float32()}
    named = events.rename(columns={"user_id": "user", "item_id": "item"})
    table = pa.table({name: pa.array(named[name], types.get(name, pa.large_string())) for name in named.columns})
    prepare_batches(RawRatings(folder.name, [folder.with_suffix(".csv")]), [table], folder, 1 << 30)
    return SequenceDataset.open(folder)


def test_data_that_grew_since_are_read_as_in_training(tmp_path: Path) -> None:
    """With new users before the others, new categories, and numbers of another mean."""
    rng = np.random.default_rng(0)
    shelves, items = np.array(["b", "c", "d"]), [f"i{item}" for item in range(8)]
    events = pd.DataFrame(
        [(f"u{user}", item, time) for user in range(9) for time, item in enumerate(rng.permutation(items))],
        columns=["user_id", "item_id", "timestamp"],
    )
    events["shelf"], events["progress"] = shelves[rng.integers(0, 3, len(events))], rng.random(len(events))
    new = events["user_id"] < "u3"
    events.loc[new, "shelf"] = "a"
    events.loc[new, "progress"] += 7
    folder = tmp_path / "prepared" / "grows"
    choice = {**MOL, "dataset_name": str(folder), "event_features": ("shelf", "progress")}
    place, _, _ = make_run(tmp_path, prepared(events[~new], folder), choice)
    prepared(events, folder)
    options = Options((), (), tmp_path, str(place))
    assert predict(options, "all", "all", 5, False, None, tmp_path / "recs.parquet") == 0
    found = pd.read_parquet(tmp_path / "recs.parquet").sort_values(["user_id", "rank"])
    own = Recommender.load(place).recommend(events, k=5, exclude_seen=False).sort_values(["user_id", "rank"])
    assert found["item_id"].tolist() == own["item_id"].tolist() and len(found) == 45
    assert found["score"].tolist() == pytest.approx(own["score"].tolist(), rel=1e-4)
    prepared(events.drop(columns="progress"), folder)
    with pytest.raises(UserError, match="has no column 'progress', which the model reads of each event"):
        predict(options, "all", "all", 5, False, None, tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda events: events.drop(columns="timestamp"), "has no column 'timestamp', which the model reads"),
        (lambda events: events.drop(columns="rating"), "has no column 'rating', which the model reads"),
        (lambda events: events.assign(rating=50.0), "has ratings from 50 to 50, and the model reads those from 0 to 5"),
    ],
)
def test_data_that_the_model_cannot_read_are_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], words: str
) -> None:
    rows = [(f"u{user}", f"i{item}", 3.0, item) for user in range(9) for item in range(8)]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    folder = tmp_path / "prepared" / "changes"
    choice = {"main_module": "HSTU", "input_preprocessor": "CombinedItemAndRating", "dataset_name": str(folder)}
    place, _, _ = make_run(tmp_path, prepared(events, folder), choice)
    prepared(change(events), folder)
    with pytest.raises(UserError, match=words):
        predict(Options((), (), tmp_path, str(place)), "all", "all", 5, False, None, tmp_path / "none.parquet")


def test_ids_are_read_from_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeffa\u2028b\r\nc\x85d\n lead\n\na\u2028b\n".encode())
    assert _ids(str(tmp_path / "ids.txt"), "--users", "user_id") == ["a\u2028b", "c\x85d", " lead"]
    (tmp_path / "IDS.CSV").write_text("user_id\n007\n8\n")
    assert _ids(str(tmp_path / "IDS.CSV"), "--users", "user_id") == ["007", "8"]
    pd.DataFrame({"user_id": [7.0, 8.0, None]}).to_parquet(tmp_path / "ids.parquet")
    assert _ids(str(tmp_path / "ids.parquet"), "--users", "user_id") == ["7", "8"]


def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "recs.csv").mkdir()
    with pytest.raises(UserError, match="--output=.*not the name of a file"):
        predict(Options((), (), tmp_path, str(tmp_path)), "all", "all", 5, False, None, tmp_path / "recs.csv")
    (tmp_path / "run.lock").touch()  # of a run, whose records are no place for an answer
    with pytest.raises(UserError, match="--output=.*keeps its records there"):
        predict(Options((), (), tmp_path, str(tmp_path)), "all", "all", 5, False, None, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("output", "flags", "words"),
    [
        ("recs.txt", (), "must end in .parquet, .csv, .jsonl"),
        ("recs.csv", ("--users=/nowhere",), "--users=/nowhere: cannot be read"),
        ("recs.csv", (f"--users={RELEASE / 'ratings.csv'}",), "cannot be read: "),
        ("recs.csv", (f"--users={__file__}",), "names no user of"),
        ("recs.csv", (f"--candidates={__file__}",), "names no item that the model knows"),
    ],
)
def test_faults_report_one_line_errors_and_nothing_is_written(
    folder: Path, output: str, flags: tuple[str, ...], words: str
) -> None:
    done = run(folder, output, *flags)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (folder / output).exists()
