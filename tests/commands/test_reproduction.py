"""Reproductions on tiny data: runs, what is done twice, what fails, what stops, and the page of the JSON files
alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from generative_recommenders.commands.reproduction import results
from generative_recommenders.commands.reproduction.lanes import data_root_of, lanes_of
from generative_recommenders.commands.reproduction.page import write_page
from programs import ROOT, forked_jobs, run_program, started
from tiny_data import ragged_sequences, tiny_dataset

PROGRAM = "generative_recommenders.reproduce"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data without item features under the name of the embedded ones."""
    root = tmp_path_factory.mktemp("reproduce")
    tiny = tiny_dataset(root, ragged_sequences(57, 30, seed=5))
    shutil.copytree(tiny.folder, root / "prepared" / "synthetic-books")
    return root


def flags(data_root: Path, out: Path, *more: str) -> list[str]:
    return [
        "synthetic-books", f"--data_root={data_root}", f"--runs_dir={out / 'runs'}",
        f"--results_dir={out / 'results'}", *more,
    ]  # fmt: skip


def test_runs_become_results_and_a_page_and_are_made_once(data_root: Path, tmp_path: Path) -> None:
    """A cell that cannot run on the data is named with its line, and the others continue; a plug-in is loaded by every
    run."""
    plugin, loaded = tmp_path / "own.py", tmp_path / "loaded"
    plugin.write_text(f"import os\nopen({str(loaded)!r}, 'a').write(f'{{os.getpid()}}\\n')\n")
    wanted = ("--epochs=1", "--only=sasrec,two-tower-genres", "--seeds=2", "--jobs=2", "--commit=abc",
              f"--plugin={plugin}")  # fmt: skip
    done = run_program(PROGRAM, *flags(data_root, tmp_path, *wanted), before=forked_jobs)
    assert done.returncode == 1, done.stderr[-3000:]
    assert len({*loaded.read_text().split()}) > 4  # the program and its four runs
    made = tmp_path / "results" / "synthetic-books"
    found = {path.name: json.loads(path.read_text()) for path in made.glob("*.json")}
    first, second = (found[f"leave_one_out-sasrec-seed-{seed}.json"] for seed in (42, 43))
    assert first["settings_sha256"] == second["settings_sha256"] and first["split_hash"] == second["split_hash"]
    assert first["epochs"] == first["best_epoch"] == first["last"]["epoch"] == 1
    assert len(first["ranks"]) == 53 and first["ranks"] != second["ranks"]
    hits = sum(rank is not None and rank <= 10 for rank in first["ranks"]) / 53
    assert first["test"]["hr@10"] == pytest.approx(hits, abs=1e-5)
    assert first["commit"] and first["processor"] and first["environment"]["torch"] and first["memory_mb"]
    failed = found["leave_one_out-two-tower-genres-seed-42.json"]["failed"]
    assert failed.startswith("error: ") and "\n" not in failed
    page = (tmp_path / "results" / "synthetic-books.md").read_text()
    assert failed in page and first["split_hash"] in page and page.strip() in done.stdout
    assert "± " in next(line for line in page.splitlines() if line.startswith("| sasrec "))
    assert (made / "leave_one_out.png").read_bytes().startswith(b"\x89PNG")

    shutil.rmtree(tmp_path / "runs")  # the results alone say what is done
    again = run_program(PROGRAM, *flags(data_root, tmp_path, "--epochs=1", "--only=sasrec", "--seeds=2"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is in" in again.stderr and not list(tmp_path.glob("runs/*/*/*/metrics.jsonl"))

    (tmp_path / "results" / "synthetic-books.md").unlink()
    told = run_program(PROGRAM, *flags(tmp_path / "no-data", tmp_path, "--report_only"))
    assert told.returncode == 0, told.stderr[-3000:]
    assert (tmp_path / "results" / "synthetic-books.md").read_text() == page
    part = run_program(PROGRAM, *flags(tmp_path / "no-data", tmp_path, "--report_only", "--only=sasrec"))
    assert part.returncode == 2 and "leave out --only" in part.stderr


def test_a_stopped_reproduction_resumes(data_root: Path, tmp_path: Path) -> None:
    wanted = flags(data_root, tmp_path, "--epochs=12", "--only=sasrec", "--seeds=1")
    run = tmp_path / "runs" / "leave_one_out" / "sasrec" / "seed-42"
    process = started([PROGRAM, *wanted], ROOT, tmp_path / "out", tmp_path / "err", forked_jobs)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.is_alive() and time.monotonic() < until, (tmp_path / "err").read_text()
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 130, (tmp_path / "err").read_text()
    assert not list((tmp_path / "results").glob("*/*.json"))
    done = run_program(PROGRAM, *wanted, before=forked_jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in run.with_name("seed-42.log").read_text()
    (result,) = (tmp_path / "results").glob("*/*.json")
    assert json.loads(result.read_text())["epochs"] == 12


def test_runs_on_other_data_are_no_results(data_root: Path, tmp_path: Path) -> None:
    """As after the data were prepared anew."""
    (lane,) = lanes_of("synthetic-books", tmp_path / "runs", 1)
    (cell,) = lane.chosen(["sasrec"])
    run = lane.run(cell, 42)
    run.folder.mkdir(parents=True)
    (run.folder / "resolved.gin").write_text(run.resolved)
    final = {"step": 1, "part": "final", "model": "SASRec", "results": {"SASRec": {}}, "split_hash": "other"}
    (run.folder / "metrics.jsonl").write_text(json.dumps(final) + "\n")
    done = run_program(PROGRAM, *flags(data_root, tmp_path, "--epochs=1", "--only=sasrec", "--seeds=1"))
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "seed-42 was trained on other data than " in line and "give another --runs_dir" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only=sasrecc"], "synthetic-books has no cell sasrecc; it has "),
        (["--lane=paper"], "--lane=paper is none of synthetic-books: leave_one_out"),
        (["--jobs=0"], "must be 1 or more"),
        (["--table=losses", "--only=fuxi"], "no cell of synthetic-books is meant by all of --table=losses --only=fuxi"),
        (["--only=sasrec", "--jobs=1000"], "--jobs=1000 on "),
        (["--only=sasrec", "--results_dir=README.md"], "README.md is not a folder"),
        (["--report_only", "--raw_path=ml-1m.zip"], "leave out --raw_path"),
    ],
)
def test_flags_that_cannot_be_meant(data_root: Path, tmp_path: Path, given: list[str], message: str) -> None:
    done = run_program(PROGRAM, *flags(data_root, tmp_path, *given))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()


def test_raw_files_that_are_not_read_are_named(
    data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (lane,) = lanes_of("synthetic-books", tmp_path / "runs", 1)
    caplog.set_level("INFO", logger="absl")
    assert data_root_of(lane, "synthetic-books", data_root, tmp_path / "absent") == data_root
    assert "synthetic-books is prepared already: --raw_path is not read" in caplog.text


def test_the_commit_is_that_of_this_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package installed within somebody's own repository git would tell theirs."""
    package = tmp_path / "venv" / "package"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True)
    told = {}
    for root in (tmp_path, package):
        monkeypatch.setattr(results, "ROOT", root)
        told[root] = results.machine_facts(1, None)["commit"]
    assert len(told[tmp_path]) == 12 and told[package] == "unknown"
    assert results.machine_facts(1, "abc")["commit"] == "abc"


def test_data_that_cannot_be_had_are_named_and_the_page_is_made(tmp_path: Path) -> None:
    out = [
        f"--data_root={tmp_path}",
        f"--runs_dir={tmp_path / 'runs'}",
        f"--results_dir={tmp_path / 'results'}",
    ]
    done = run_program(PROGRAM, "ml-100k", f"--raw_path={tmp_path / 'absent'}", *out)
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "results" / "ml-100k.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("Not run on this machine: "))
    assert "ml-100k cannot be had" in line and "does not exist" in line and "| hstu-no-time |" in page


def test_a_page_says_what_the_runs_of_a_lane_need(tmp_path: Path) -> None:
    lanes = lanes_of("ml-20m", tmp_path / "runs", None)
    (tmp_path / "ml-20m").mkdir()
    lines = write_page("ml-20m", lanes, tmp_path, {}).splitlines()
    (told,) = (lane.settings.needs for lane in lanes)
    heading = next(number for number, line in enumerate(lines) if line.startswith("## "))
    assert told and lines[heading + 2] == f"Needs: {told}."


def test_a_lane_of_protocol_paper_shows_the_best_epoch_on_the_test_item(tmp_path: Path) -> None:
    known = ROOT / "docs" / "results" / "ml-1m" / "leave_one_out-hstu-seed-42.json"
    record = json.loads(known.read_text()) | {"lane": "paper", "protocol": "paper"}
    record["best"] |= {"hr@10": 0.51, "ndcg@10": 0.41, "mrr": 0.31}
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "paper-hstu-seed-42.json").write_text(json.dumps(record))
    page = write_page("ml-1m", lanes_of("ml-1m", tmp_path / "runs", None), tmp_path, {})
    row = next(line for line in page.splitlines() if line.startswith("| hstu (arXiv 2402.17152)"))
    assert "| 0.5100 | **0.4100** |" in row and "| 0.3100 |" in row
    assert "of the epoch with the best test NDCG@10, as published" in page
