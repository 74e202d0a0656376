"""Runs and prepared data of release 0.1.0: each still opens, evaluates to the same numbers, and trains on."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from generative_recommenders.data.store import SequenceDataset
from programs import run_program

OLD_RULE = Path(__file__).parent / "targets_stay.py"
RELEASE = Path(__file__).parent / "v0_1_0"
RUNS = sorted(path.name for path in (RELEASE / "runs").iterdir())


@pytest.fixture
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a run of 0.1.0, with the prepared data that it was trained on beside it."""
    shutil.copytree(RELEASE / "prepared", tmp_path / "data" / "prepared")
    return Path(shutil.copytree(RELEASE / "runs" / request.param, tmp_path / "runs" / request.param))


def recorded(run_dir: Path) -> dict[str, dict[str, float]]:
    """The results that the run wrote last, by row of its table."""
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["results"]


def table(output: str) -> dict[str, list[float]]:
    """Rows of a printed table of results."""
    rows = {}
    for line in filter(str.strip, output.splitlines()):
        name, *numbers = line.rsplit(maxsplit=5)
        if len(numbers) == 5 and all(number.replace(".", "").isdigit() for number in numbers):
            rows[name.strip()] = [float(number) for number in numbers]
    return rows


@pytest.mark.parametrize("run_dir", RUNS, indirect=True)
def test_old_run_evaluates_to_its_recorded_numbers(run_dir: Path) -> None:
    """Release 0.1.0 ranked a target that the user had already as if it were new: the plug-in filter keeps that rule.
    Under today's `history` such targets are misses, so that no number is above its recorded one."""
    evaluate = (
        "main.py",
        "--mode=evaluate",
        f"--run_dir={run_dir}",
        f"--data_root={run_dir.parents[1] / 'data'}",
    )
    old_rule = (f"--plugin={OLD_RULE}", "--gin_bindings=train_fn.seen_filter = 'targets_stay'")
    result, today = run_program(*evaluate, *old_rule), run_program(*evaluate)
    assert (result.returncode, today.returncode) == (0, 0), result.stderr + today.stderr
    printed, lower = table(result.stdout), table(today.stdout)
    for name, metrics in recorded(run_dir).items():
        expected = [metrics[key] for key in ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr")]
        assert printed[name] == pytest.approx(expected, abs=6e-5), name
        assert all(new <= old for new, old in zip(lower[name], printed[name]))
    assert re.search(r"targets among the seen items, misses: [1-9]\d* of 80", today.stdout), today.stdout


@pytest.mark.parametrize("run_dir", RUNS, indirect=True)
def test_old_run_trains_on(run_dir: Path) -> None:
    result = run_program(
        "main.py",
        "--resume",
        f"--run_dir={run_dir}",
        f"--data_root={run_dir.parents[1] / 'data'}",
        "--gin_bindings=train_fn.num_epochs = 4",
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "epoch" in record]
    assert epochs[-1]["epoch"] == 3  # counted from 0: the fourth
    assert all("high_rated_mrr" in epoch and "liked_mrr" not in epoch for epoch in epochs)
    newest = max((run_dir / "checkpoints").glob("*/state.json"))
    history = json.loads(newest.read_text())["progress"]["history"]
    assert all("high_rated_mrr" in epoch and "liked_mrr" not in epoch for epoch in history)
    assert "test, full catalogue" in result.stdout


@pytest.mark.parametrize("run_dir", RUNS[:1], indirect=True)
def test_an_old_finished_run_is_scored_anew_by_a_resume(run_dir: Path) -> None:
    (run_dir / "report.html").write_text("of another run")
    result = run_program(
        "main.py", "--resume", "--noreport", f"--run_dir={run_dir}", f"--data_root={run_dir.parents[1] / 'data'}"
    )
    assert result.returncode == 0, result.stderr
    assert "test, full catalogue" in result.stdout
    assert not (run_dir / "report.html").exists()


def test_old_prepared_folder_opens_and_is_what_its_file_is_prepared_into_today(tmp_path: Path) -> None:
    old = SequenceDataset.open(RELEASE / "prepared" / "readers")
    old.verify()
    raw = tmp_path / "ratings.csv"
    raw.write_bytes(gzip.decompress((RELEASE / "ratings.csv.gz").read_bytes()))
    result = run_program(
        "preprocess_public_data.py",
        "--dataset=csv",
        f"--raw_path={raw}",
        "--name=readers",
        f"--data_root={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    new = SequenceDataset.open(tmp_path / "prepared" / "readers")
    assert new.manifest.data_hash == old.manifest.data_hash
    assert new.manifest.split_hashes == old.manifest.split_hashes
    assert new.original_item_ids().to_pylist() == old.original_item_ids().to_pylist()
    for column in ("items", "ratings", "timestamps", "offsets"):
        assert getattr(new, column).tolist() == getattr(old, column).tolist()
