"""Results of --mode=evaluate: the numbers in the run's folder, and each user's rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from generative_recommenders.commands import evaluate
from generative_recommenders.commands.setup import Options
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from programs import forked_members, run_program
from recommender_runs import make_run
from tiny_data import ragged_sequences, tiny_dataset

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a copy of a small run and its data."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(RELEASE / "prepared", root / "data" / "prepared")
    shutil.copytree(RELEASE / "runs" / "sasrec", root / "run")
    return [f"--run_dir={root / 'run'}", f"--data_root={root / 'data'}"]


@pytest.mark.parametrize(("suffix", "processes"), [("csv", 1), ("parquet", 2), ("jsonl", 1)])
def test_users_ranks_give_the_metrics_of_the_record(place: list[str], suffix: str, processes: int) -> None:
    run = Path(place[0].partition("=")[2])
    ranks = run / f"ranks.{suffix}"
    bindings = ["--gin_bindings=train_fn.eval_batch_size = 7"]
    done = run_program(
        "main.py",
        "--mode=evaluate",
        f"--users_metrics={ranks}",
        f"--num_processes={processes}",
        *place,
        *bindings,
        before=forked_members,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "evaluation.json").read_text())
    assert record["bindings"] == ["train_fn.eval_batch_size = 7"]
    assert record["conditions"] in done.stdout and record["checkpoint"] in done.stdout
    read = {"csv": pl.read_csv, "parquet": pl.read_parquet, "jsonl": pl.read_ndjson}[suffix]
    frame = read(ranks)
    assert frame.columns == ["user_id", "item_id", "rank"]
    assert frame["user_id"].n_unique() == len(frame)
    hits = (frame["rank"].fill_null(10**6) <= 10).mean()
    assert hits == pytest.approx(record["results"]["SASRec"]["hr@10"])


def test_a_file_of_another_kind_is_refused(place: list[str]) -> None:
    done = run_program("main.py", "--mode=evaluate", "--users_metrics=ranks.txt", *place)
    assert done.returncode == 2
    assert "--users_metrics=ranks.txt: the name must end in .csv, .jsonl, .parquet" in done.stderr
    training = run_program("main.py", "--users_metrics=ranks.txt")
    assert training.returncode == 2 and "the name must end in .csv" in training.stderr
    nowhere = run_program("main.py", "--mode=evaluate", f"--users_metrics={__file__}/ranks.csv", *place)
    assert nowhere.returncode == 2 and f"{__file__} is not a folder" in nowhere.stderr
    assert not nowhere.stdout, "told before the run is scored"


def test_a_checkpoint_that_is_removed_while_the_data_are_read_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a training that goes on beside."""
    dataset = tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=1))
    run, _, _ = make_run(tmp_path, dataset, {"dataset_name": str(dataset.folder)})
    read = evaluate.shared_dataset

    def removed_meanwhile(*arguments: Any) -> SequenceDataset:
        shutil.rmtree(run / "checkpoints")
        return read(*arguments)

    monkeypatch.setattr(evaluate, "shared_dataset", removed_meanwhile)
    opened = evaluate.open_run(Options((), (), tmp_path, str(run)), Collectives())
    _, test = evaluate.score_run(opened, Collectives())
    assert test.targets > 0


def test_targets_that_the_run_was_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = tiny_dataset(tmp_path, ragged_sequences(20, 12, seed=1))
    run, _, _ = make_run(tmp_path, dataset, {"dataset_name": str(dataset.folder)})

    def warned(protocol: str) -> list[str]:
        caplog.clear()
        bindings = (f"train_fn.protocol = {protocol!r}",)
        evaluate.open_run(Options((), bindings, tmp_path, str(run)), Collectives())
        return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]

    targets = make_split(dataset, "global_time").test_targets
    learned = sum(0 <= target < length - 2 for target, length in zip(targets, dataset.lengths) if length > 2)
    assert learned and f"on {learned} of the {(targets >= 0).sum()} test targets" in warned("global_time")[0]
    assert not warned("leave_one_out")


def test_runs_over_other_candidates_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, items, seen_filter in (("a", 12, "none"), ("b", 13, "none"), ("c", 12, "history")):
        dataset = tiny_dataset(tmp_path / name, ragged_sequences(20, items, seed=1))
        choice = {"dataset_name": str(dataset.folder), "seen_filter": seen_filter}
        runs.append(make_run(tmp_path / name, dataset, choice)[0])
    for other, line in zip(runs[1:], ("ranks 13 items, .* 12, not all", "seen filter 'history', .* 'none'")):
        with pytest.raises(UserError, match=line):
            evaluate.evaluate_worker(0, 1, Options((), (), tmp_path, str(runs[0]), compare=str(other)))
    tiny_dataset(tmp_path / "b", ragged_sequences(20, 13, seed=2))
    with pytest.raises(UserError, match=f"--compare={runs[1]}: the prepared data changed since this run began"):
        evaluate.evaluate_worker(0, 1, Options((), (), tmp_path, str(runs[0]), compare=str(runs[1])))
    assert not capsys.readouterr().out, "told before the runs are scored"


def test_what_is_not_prepared_lists_what_is_and_the_command(place: list[str]) -> None:
    for name, command in (
        ("music", "--dataset=csv --raw_path=FILE --name=music"),
        ("ml-1m", "--dataset=ml-1m"),
    ):
        done = run_program("main.py", f"--gin_bindings=train_fn.dataset_name = '{name}'", place[1])
        assert done.returncode == 2
        assert f"{name} is not prepared" in done.stderr and "prepared: readers" in done.stderr
        assert f"preprocess_public_data.py {command} --{place[1].removeprefix('--')}" in done.stderr
