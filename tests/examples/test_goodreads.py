"""The Goodreads plug-in: prepared by its program, trained by main.py."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from generative_recommenders.data.store import SequenceDataset
from programs import run_program

PLUGIN = "--plugin=examples/plugins/goodreads.py"
SHORT = (
    "train_fn.dataset_name = 'goodreads'", "train_fn.max_sequence_length = 12", "train_fn.num_epochs = 1",
    "train_fn.local_batch_size = 8", "train_fn.item_embedding_dim = 8", "train_fn.eval_interval = 2",
)  # fmt: skip


def events() -> list[dict[str, object]]:
    """24 users with eight of twelve books each, in the order that they were added; one reader has a single book."""
    found: list[dict[str, object]] = []
    for user in range(24):
        for place in range(8):
            added = datetime.fromtimestamp(1_400_000_000 + 86_400 * place + user, UTC)
            found.append(
                {
                    "user_id": f"{user:032x}", "book_id": str(100 + (user + place) % 12),
                    "review_id": f"{user}-{place}", "is_read": True, "rating": (user + place) % 6,
                    "date_added": added.strftime("%a %b %d %H:%M:%S +0000 %Y"), "date_updated": "", "read_at": "",
                }
            )  # fmt: skip
    return [*found, {**found[0], "user_id": "once", "book_id": "999"}]


def write(path: Path, form: str) -> None:
    with path.open("w", newline="") as file:
        if form == "json":
            file.writelines(json.dumps(each) + "\n" for each in events())
            return
        writer = csv.DictWriter(file, list(events()[0]))
        writer.writeheader()
        writer.writerows(events())


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_goodreads_file_is_prepared_and_trained(tmp_path: Path, form: str) -> None:
    write(tmp_path / f"interactions.{form}", form)
    place = f"--data_root={tmp_path / 'data'}"
    prepared = run_program(
        "preprocess_public_data.py", PLUGIN, "--dataset=goodreads", place,
        f"--raw_path={tmp_path / f'interactions.{form}'}",
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    dataset = SequenceDataset.open(tmp_path / "data" / "prepared" / "goodreads")
    assert (dataset.num_users, dataset.num_items) == (24, 12)
    assert dataset.timestamps[:8].tolist() == [1_400_000_000 + 86_400 * day for day in range(8)]
    assert dataset.ratings[:8].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    if form == "json":
        run = [place, f"--run_dir={tmp_path / 'run'}"]
        trained = run_program(
            "main.py", *run, "--max_steps=2", "--gin_config_file=configs/models/sasrec-d50.gin",
            *(f"--gin_bindings={each}" for each in SHORT),
        )  # fmt: skip
        assert trained.returncode == 0, trained.stderr
        resumed = run_program("main.py", *run, "--resume")  # the prepared data need no plug-in
        assert resumed.returncode == 0, resumed.stderr
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert 2 in steps and max(steps) == 3


def test_the_plugin_source_is_listed_and_needs_its_file(tmp_path: Path) -> None:
    listed = run_program("preprocess_public_data.py", PLUGIN, "--list")
    assert listed.returncode == 0, listed.stderr
    assert {"ml-1m", "csv", "goodreads", "exchange-text"} <= set(listed.stdout.split())
    for flags, message in (
        (["--dataset=goodreads"], "unknown data source 'goodreads' (--dataset)"),
        ([PLUGIN, "--dataset=goodreads"], "--dataset=goodreads needs --raw_path=FILE"),
        ([PLUGIN, "--dataset=goodread"], "did you mean 'goodreads'"),
        ([PLUGIN, "--dataset=goodreads", "--columns=user,item"], "--columns is for --dataset=csv"),
        (["--plugin=nowhere.py", "--list"], "--plugin: no file at nowhere.py"),
    ):
        refused = run_program("preprocess_public_data.py", f"--data_root={tmp_path}", *flags)
        assert refused.returncode == 2
        assert message in refused.stderr and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
