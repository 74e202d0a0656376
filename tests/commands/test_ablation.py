"""Ablations on tiny data: cells and grids, tables, what is done twice, what fails, what stops, and what cannot be
meant."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import torch

from generative_recommenders.checkpoint.store import CheckpointStore
from generative_recommenders.commands.ablation.jobs import Slot, run_all
from generative_recommenders.commands.ablation.plan import Ablation, Cell, Run, names_in
from generative_recommenders.commands.ablation.records import Finished, summary
from generative_recommenders.commands.ablation.tables import collect, write_tables
from generative_recommenders.commands.comparison import METRICS, user_values
from generative_recommenders.config.plugins import load_plugins
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.significance import holm
from programs import ROOT, forked_jobs, run_program, started
from tiny_data import ragged_sequences, tiny_dataset

BASE = """
train_fn.dataset_name = "tiny"
train_fn.item_embedding_dim = 8
train_fn.max_sequence_length = 10
train_fn.sampling_strategy = "local"
train_fn.num_negatives = 4
train_fn.num_epochs = 1
"""
PROGRAM = "generative_recommenders.ablate"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ablation")
    (root / "prepared").mkdir()
    tiny_dataset(root / "prepared", ragged_sequences(57, 30, seed=5))
    return root


def ablate(file: Path, data_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [f"--data_root={data_root}", f"--runs={file.parent / 'runs'}"]
    return run_program(PROGRAM, str(file), *given, *arguments, before=forked_jobs)


def test_cells_and_seeds_become_one_table_and_nothing_is_trained_twice(data_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "losses.gin"
    file.write_text(
        BASE + 'ablation.cells = {"ce": {"train_fn.loss_module": "CE"}, '
        '"impossible": {"train_fn.dataset_name": "absent"}}\n'
    )
    done = ablate(file, data_root, "--seeds=2", "--jobs=2")
    assert done.returncode == 1, done.stderr[-3000:]
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert set(results["failed"]) == {"impossible/seed-42", "impossible/seed-43"}
    assert "absent is not prepared" in results["failed"]["impossible/seed-42"]
    (row,) = results["cells"]
    assert (row["cell"], row["seeds"]) == ("ce", [42, 43])
    ablation = Ablation.load(file, (), tmp_path / "runs")
    runs = [ablation.run(ablation.cells[0], seed) for seed in (42, 43)]
    measured = [summary(run)["test"]["ndcg@10"] for run in runs]
    assert row["test"]["ndcg@10"]["mean"] == pytest.approx(sum(measured) / 2)
    low, high = row["interval"]  # of the users' values, whose mean is that of the runs
    assert low <= row["test"]["ndcg@10"]["mean"] <= high
    markdown = (tmp_path / "runs" / "table.md").read_text()
    assert markdown.strip() in done.stdout
    assert row["split_hash"] in markdown and "failed: impossible/seed-42: error:" in markdown

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/seed-*/*.jsonl")}
    again = ablate(file, data_root, "--seeds=2", "--only=ce")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    other = ablate(file, data_root, "--only=ce", "--gin_bindings=train_fn.learning_rate = 0.5")
    assert other.returncode == 2
    assert "was made with train_fn.learning_rate = 0.001, not 0.5: give another folder of runs" in other.stderr


def finished(ablation: Ablation, cell: Cell, seed: int, ranks: list[int | None]) -> Run:
    """A run folder as main.py leaves it: three epochs of 3 seconds, the second one best of those with all users."""
    run = ablation.run(cell, seed)
    run.folder.mkdir(parents=True)
    (run.folder / "resolved.gin").write_text(run.resolved)
    frame = pl.DataFrame({"user_id": ["a", "b", "c", "d"], "item_id": ["i"] * 4, "rank": ranks})
    frame.write_parquet(run.measured)
    means = {metric: user_values(frame, metric, 30)["value"].mean() for metric in METRICS}
    lines = [
        *(
            {
                "step": e,
                "part": "validation",
                "epoch": e,
                "seconds": 3.0 * (e + 1),
                "ndcg@10": e,
                "full": e < 2,
            }
            for e in range(3)
        ),
        {
            "step": 2,
            "part": "final",
            "model": "SASRec",
            "results": {"SASRec": means},
            "peak_rss_mb": 1234,
            "split_hash": "f00",
            "num_items": 30,
        },
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_runs_of_another_version_of_a_plugin_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_plugins([str(ROOT / "examples/plugins/gru4rec.py")])
    file = tmp_path / "mine.gin"
    file.write_text(
        BASE + 'train_fn.main_module = "GRU4Rec"\nablation.cells = {"ce": {"train_fn.loss_module": "CE"}}\n'
    )
    ablation = Ablation.load(file, (), tmp_path / "runs")
    for seed, changes in ((1, {}), (2, {"sha256": "of another file"})):
        run = finished(ablation, ablation.cells[0], seed, [1, 2, 3, 4])
        saved = run.settings.to_json()
        store = CheckpointStore(run.folder / "checkpoints")
        plugins = [{**each, **changes} for each in saved["plugins"]]
        store.attach(pa.array(["i"]), {**saved, "plugins": plugins}, run.resolved)
        store.save((3, 3), {"weight": torch.zeros(1)}, {})
    assert len(plugins) == 1
    for seed in (1, 2):
        ablation.run(ablation.cells[0], seed)
    (warning,) = caplog.messages
    assert "ce/seed-2 was trained with another version of its plug-in" in warning


def test_tables_of_finished_runs(tmp_path: Path) -> None:
    file = tmp_path / "x.gin"
    file.write_text(
        BASE
        + 'ablation.cells = {"b_1": {}, "a": {"train_fn.learning_rate": 0.5}, "c": {"train_fn.learning_rate": 0.1}}'
    )
    ablation = Ablation.load(file, (), tmp_path)
    cells = ablation.cells
    ranks = {"b_1": [[1, 1, 2, 3], [1, 1, 2, 4]], "a": [[9, None, 5, 11], [9, 8, 5, 11]], "c": [[1, 1, 2, 3]]}
    runs = {c.name: [Finished.of(finished(ablation, c, 42 + i, r)) for i, r in enumerate(ranks[c.name])] for c in cells}
    results = collect(runs, "ndcg@10")
    assert [row["cell"] for row in results["cells"]] == ["c", "b_1", "a"]
    row = results["cells"][1]
    by_seed = [statistics.fmean([1, 1, 1 / math.log2(3), last]) for last in (1 / 2, 1 / math.log2(5))]
    spread = row["test"]["ndcg@10"]
    assert spread == pytest.approx({"mean": statistics.fmean(by_seed), "deviation": statistics.stdev(by_seed)})
    assert (row["seconds_per_epoch"], row["memory_mb"], row["best_epochs"], row["users"]) == (
        3,
        1234,
        [2, 2],
        4,
    )
    pairs = {tuple(pair["cells"]): pair for pair in results["pairs"]}
    assert set(pairs) == {("c", "b_1"), ("c", "a"), ("b_1", "a")}
    means = {each["cell"]: each["test"]["ndcg@10"]["mean"] for each in results["cells"]}
    assert pairs["c", "a"]["difference"] == pytest.approx(means["c"] - means["a"])
    assert [pair["p_holm"] for pair in results["pairs"]] == holm([pair["p"] for pair in results["pairs"]])
    text = write_tables(results, tmp_path / "out", "Ablation x")
    assert (tmp_path / "out" / "table.md").read_text() == text + "\n"
    with open(tmp_path / "out" / "table.csv", newline="") as lines:
        head, *rows = csv.reader(lines)
    assert head[:3] == ["cell", "seeds", "NDCG@10"] and [each[1] for each in rows] == ["1", "2", "2"]
    shown = [dict(zip(head, each)) for each in rows]
    assert {(each["validation NDCG@10"], each["split"]) for each in shown} == {("1.0000", "f00")}
    latex = (tmp_path / "out" / "table.tex").read_text()
    assert r"b\_1 & 2 & " in latex and r"$\pm$" in latex and r"95 \% interval" in latex
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    tests = (tmp_path / "out" / "pairs.tex").read_text()
    assert f"c & b\\_1 & {pairs['c', 'b_1']['difference']:+.4f}" in tests and "p (Holm)" in tests


def test_seeds_on_different_splits_are_not_compared(tmp_path: Path) -> None:
    file = tmp_path / "x.gin"
    file.write_text(BASE + 'ablation.cells = {"a": {}, "b": {"train_fn.learning_rate": 0.5}}')
    ablation = Ablation.load(file, (), tmp_path)
    runs = {
        cell.name: [Finished.of(finished(ablation, cell, seed, [1, 1, 2, 3])) for seed in (42, 43)]
        for cell in ablation.cells
    }
    runs["b"][1].summary["split_hash"] = "ba5"
    assert runs["b"][1].ranks is not None
    runs["b"][1] = runs["b"][1]._replace(ranks=runs["b"][1].ranks.with_columns(item_id=pl.lit("j")))
    results = collect(runs, "ndcg@10")
    rows = {row["cell"]: row for row in results["cells"]}
    assert rows["a"]["users"] == 4 and rows["b"]["users"] is None and not results["pairs"]
    assert "split ba5, f00: " in write_tables(results, tmp_path / "out", "x")


def test_cells_with_other_candidates_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.gin"
    cells = {name: {"train_fn.seen_filter": each} for name, each in zip("abc", ("none", "none", "window"))}
    file.write_text(BASE + f"ablation.cells = {cells}")
    ablation = Ablation.load(file, (), tmp_path)
    runs = {
        cell.name: [Finished.of(finished(ablation, cell, 42, [1, 1, None, 3 + place]))]
        for place, cell in enumerate(ablation.cells)
    }
    results = collect(runs, "mrr")
    assert [pair["cells"] for pair in results["pairs"]] == [["a", "b"]]
    assert "another catalogue or seen filter are not compared: 2 pairs, as a and c" in caplog.text
    low, high = results["cells"][0]["interval"]
    assert low <= results["cells"][0]["test"]["mrr"]["mean"] <= high
    for own in runs.values():  # as recorded by earlier releases
        for name in ("catalogue", "seen_filter", "num_items"):
            del own[0].summary[name]
    assert len(collect(runs, "mrr")["pairs"]) == 3


def test_a_failure_is_told_by_the_lines_of_this_start(tmp_path: Path) -> None:
    run = Run(Cell("x"), tmp_path / "x" / "seed-1", RunSettings(), "")
    run.folder.parent.mkdir()
    run.log.write_text("error: of an earlier start\n")
    told: list[str | None] = []
    command = ["sh", "-c", "echo was killed; exit 3"]
    run_all(iter([run]), lambda run, line: told.append(line), [Slot({})], lambda run: command)
    assert told == [f"was killed (exit code 3, {run.log})"]


def test_a_search_chooses_by_validation_and_says_what(tmp_path: Path) -> None:
    """The trial that is worse on the test targets, where it is better on validation."""
    file = tmp_path / "x.gin"
    file.write_text(BASE)
    ablation = Ablation.load(file, (), tmp_path)
    ranks = {"trial-000": [1, 1, 1, 1], "trial-001": [3, 3, 3, 3]}
    found: dict[str, list[Finished]] = {}
    for number, (name, each) in enumerate(ranks.items()):
        cell = Cell(name, (f"train_fn.learning_rate = {0.1 + number}",))
        done = Finished.of(finished(ablation, cell, 42, list(each)))
        done.summary["best"]["ndcg@10"] = 0.1 + number
        found[name] = [done]
    assert collect(found, "ndcg@10")["chosen"] is None
    results = collect(found, "ndcg@10", by_validation=True)
    assert [row["cell"] for row in results["cells"]] == ["trial-001", "trial-000"]
    text = write_tables(results, tmp_path / "out", "Search x")
    assert "chosen by validation NDCG@10: trial-001" in text
    assert "- trial-001: train_fn.learning_rate = 1.1" in text
    for each in found.values():
        each[0].summary["protocol"] = "paper"
    assert collect(found, "ndcg@10", by_validation=True)["cells"][0]["cell"] == "trial-000"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_ablation_stops_its_runs_and_resumes(data_root: Path, tmp_path: Path, number: int) -> None:
    file = tmp_path / "long.gin"
    file.write_text(BASE.replace("num_epochs = 1", "num_epochs = 400") + 'ablation.cells = {"only": {}}\n')
    command = [PROGRAM, str(file), f"--data_root={data_root}", f"--runs={tmp_path / 'runs'}"]
    run = tmp_path / "runs" / "only" / "seed-42"
    process = started(command, ROOT, tmp_path / "out", tmp_path / "err")
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.is_alive() and time.monotonic() < until, (tmp_path / "err").read_text()
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (130 if number == signal.SIGTERM else -number), (tmp_path / "err").read_text()
    while "stopped on request" not in (log := (tmp_path / "runs" / "only" / "seed-42.log").read_text()):
        # A killed one waits for none of its runs.
        assert number == signal.SIGKILL and time.monotonic() < until, log
        time.sleep(0.1)
    with open(run / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which the run held until it ended
    epochs = (run / "metrics.jsonl").read_text().count('"epoch"')
    file.write_text(file.read_text().replace("num_epochs = 400", f"num_epochs = {epochs + 1}"))
    (run / "resolved.gin").write_text((run / "resolved.gin").read_text().replace("400", str(epochs + 1)))
    done = ablate(file, data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in (tmp_path / "runs" / "only" / "seed-42.log").read_text()


def test_cells_of_a_grid_are_named_with_their_commas() -> None:
    cells = ["a=1,b=1", "a=1,b=2", "a=1", "other"]
    assert names_in("a=1,b=2,other,a=1,,a=1,b=1", cells) == ["a=1,b=2", "other", "a=1", "a=1,b=1"]
    assert names_in("a=1,b=3,none", cells) == ["a=1", "b=3", "none"]
    assert names_in("", cells) == []


def test_a_grid_is_every_combination_of_each_cell(tmp_path: Path) -> None:
    file = tmp_path / "grid.gin"
    file.write_text(
        BASE + 'include "configs/models/sasrec-d50.gin"\n'
        'ablation.grid = {"train_fn.learning_rate": [0.1, 0.01], "sasrec_encoder.num_blocks": [1, 2, 3]}\n'
        'ablation.cells = {"a": {}, "b": {"include": "configs/models/hstu-d50.gin"}}\n'
    )
    ablation = Ablation.load(file, (), tmp_path / "runs")
    cells = ablation.cells
    assert len(cells) == 12 and cells[0].name == "a,learning_rate=0.1,num_blocks=1"
    last = ablation.run(cells[-1], 7).settings
    assert (last.model.main_module, last.value("train_fn.learning_rate")) == ("HSTU", 0.01)
    assert last.value("sasrec_encoder.num_blocks") == 3
    assert last.schedule.random_seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no cells: give ablation.cells or ablation.grid"),
        ("ablation.gird = {}", "ablation has no parameter 'gird'; did you mean 'grid'?"),
        ('ablation.grid = {"train_fn.learning_rate": 3}', "give a list of values"),
        ('ablation.cells = {"../x": {}}', "gives a folder its name"),
        ('ablation.cells = {"..": {}}', "gives a folder its name"),
        (
            'ablation.cells = {"x": {"train_fn.learning_rat": 1.0}}',
            "cell x: gin: .*did you mean 'learning_rate'",
        ),
        ('ablation.cells = {"x": {"include": "no.gin"}}', "cell x: gin: .*no gin file at 'no.gin', from [^ ]+$"),
        ('ablation.cells = {"x": {"include": "import os"}}', "no gin file at 'import os'"),
        ('ablation.cells = {"x": {"include": 3}}', "cell x: gin: "),
        ('ablation.cells = {"x": {"import os\\ntrain_fn.num_epochs": 1}}', "cell x: gin: .*cannot import"),
        ('ablation.cells = {"x": {"train_fn.num_epochs": @f()}}', "cannot refer to @f"),
        (
            'ablation.cells = {"x": {"train_fn.optimizer": "rowwise_adagrad", '
            '"rowwise_adagrad.item_learning_rate": -1.0}}',
            "rowwise_adagrad.item_learning_rate must be above 0, got -1.0",
        ),
        ("ablation.metric = 'map'", "ablation.metric 'map' is unknown; known: 'ndcg@10', 'hr@10', 'mrr'"),
        ('ablation.cells = {"x": {"train_fn.random_seed": 1}}', "binds train_fn.random_seed: give --seeds or"),
        ('ablation.grid = {"train_fn.random_seed": [1, 2]}', "binds train_fn.random_seed: give --seeds or"),
        ('ablation.search = {"train_fn.random_seed": ["int", 1, 9]}', "binds train_fn.random_seed: give --seeds or"),
        ('ablation.cells = {"x": {}}\nablation.seeds = {"y": 2}', "ablation.seeds is of y, and no cell is named so"),
        ('ablation.grid = {"a.b": [1], "c.b": [1], "train_fn.num_epochs": [1, 1]}', "two cells are named"),
        (f"ablation.grid = {dict.fromkeys(('a.b', 'c.b', 'd.b'), [1] * 11)}", "more than 1000 cells"),
    ],
)
def test_what_cannot_be_meant_reports_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.gin"
    file.write_text(BASE + text + "\n")
    with pytest.raises(UserError, match=message) as refused:
        ablation = Ablation.load(file, (), tmp_path)
        for cell in ablation.cells:
            ablation.run(cell, 1)
    assert "\n" not in str(refused.value)


def test_main_names_the_program_of_an_ablation(tmp_path: Path) -> None:
    from generative_recommenders.config.gin import load_settings

    file = tmp_path / "x.gin"
    file.write_text("ablation.grid = {}\n")
    with pytest.raises(
        UserError, match=r"x.gin, line 1: an ablation is run by python -m generative_recommenders.ablate FILE"
    ):
        load_settings([file])


def test_flags_that_cannot_go_together(tmp_path: Path, data_root: Path) -> None:
    file = tmp_path / "x.gin"
    file.write_text(BASE + 'ablation.cells = {"x": {}}\n')
    for flags, message in (
        (["--seeds=0"], "must be 1 or more"),
        (["--only=y"], "has no cell y; it has x"),
        (["--search=optuna", "--seeds=2"], "--search runs one seed"),
        (["--trials=3"], "--trials needs --search=optuna"),
    ):
        done = ablate(file, data_root, *flags)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_search_chooses_on_validation_and_resumes(data_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    file = tmp_path / "search.gin"
    file.write_text(
        BASE + 'ablation.search = {"train_fn.learning_rate": ["log", 1e-4, 1e-1], '
        '"sasrec_encoder.num_heads": ["choice", 1, 3], "sasrec_encoder.num_blocks": ["int", 1, 2]}\n'
    )
    done = ablate(file, data_root, "--search=optuna", "--trials=2")
    assert done.returncode in (0, 1), done.stderr[-3000:]
    before = {path: path.read_text() for path in (tmp_path / "runs").glob("*/parameters.json")}
    assert len(before) == 2
    again = ablate(file, data_root, "--search=optuna", "--trials=4")
    tried = {path: path.read_text() for path in (tmp_path / "runs").glob("*/parameters.json")}
    assert len(tried) == 4 and before.items() <= tried.items()
    assert len({*tried.values()}) == 4
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert len(results["cells"]) + len(results["failed"]) == 4
    assert results["chosen"] == max(results["cells"], key=lambda row: row["validation"])["cell"]
    assert all("does not divide" in line for line in results["failed"].values()), results["failed"]  # of 3 heads
    assert again.returncode == (1 if results["failed"] else 0)


def test_trials_keep_their_names_and_their_space(tmp_path: Path) -> None:
    """The folder of one may be removed, for its run to be made anew."""
    pytest.importorskip("optuna")
    from generative_recommenders.commands.ablation.search import Search

    def parameters(choices: str) -> list[str]:
        file = tmp_path / "search.gin"
        file.write_text(
            BASE + 'ablation.search = {"train_fn.learning_rate": ["log", 1e-4, 1e-1], '
            f'"train_fn.loss_module": ["choice", {choices}]}}\n'
        )
        search = Search(Ablation.load(file, (), tmp_path / "runs"), 3)
        list(search.runs())
        return [path.read_text() for path in sorted((tmp_path / "runs").glob("*/parameters.json"))]

    both = '"CE", "SampledSoftmaxLoss"'
    before = parameters(both)
    assert len(before) == 3
    shutil.rmtree(tmp_path / "runs" / "trial-000")
    again = parameters(both)
    assert again[1:] == before[1:] and again[0] not in before
    for choices, text in (('"BCELoss"', again[0]), (both, "no JSON"), (both, "3")):
        (tmp_path / "runs" / "trial-000" / "parameters.json").write_text(text)
        with pytest.raises(UserError, match="trial-000 is of another space than that of .*: give another folder"):
            parameters(choices)


@pytest.mark.parametrize(
    "given",
    [3, ["log", 1], ["log", -1.0, 1.0], ["int", 5, 1], ["choice"], ["other", 1, 2], ["int", True, 3],
     ["int", 1.5, 3.7], ["int", 1, 3.0]],
)  # fmt: skip
def test_a_range_that_cannot_be(given: object, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from generative_recommenders.commands.ablation.search import distribution

    with pytest.raises(UserError, match="ablation.search") as refused:
        distribution("train_fn.x", given, tmp_path)
    assert "\n" not in str(refused.value)
