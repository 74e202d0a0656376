"""Faults of the system through the real programs: one line and exit code 2; a reader that stops early is no fault."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from absl import app

from programs import run_program

PREPARED = Path(__file__).parent / "compatibility" / "v0_1_0" / "prepared"
LONG = "n" * 300
ODD = os.fsdecode(b"caf\xe9")
CSV = ("preprocess_public_data.py", "--dataset=csv", "--columns=user,item", "--name=mine")
SHORT = [
    "train_fn.dataset_name = 'readers'", "train_fn.num_epochs = 1", "train_fn.local_batch_size = 64",
    "train_fn.max_sequence_length = 12", "train_fn.item_embedding_dim = 8", "train_fn.num_negatives = 4",
]  # fmt: skip
TRAIN = ("main.py", *(f"--gin_bindings={each}" for each in SHORT))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, raw data, pipes where files should be, and links."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(PREPARED, folder / "prepared")
    (folder / "r.csv").write_text("u,i\nv,i\nu,j\n")
    (folder / "parts").mkdir()
    (folder / "parts" / f"{ODD}.csv").write_text("u,i\n")
    for pipe in ("pipe", "run/metrics.jsonl", "piped/readers/manifest.json"):
        (folder / pipe).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / pipe)
    (folder / "old" / "checkpoints").mkdir(parents=True)
    os.mkfifo(folder / "old" / "checkpoints" / "000001-epoch-0-step-1")
    return folder


FAULTS = {
    "empty flag": (*TRAIN, "--run_dir="),
    "name too long": (*TRAIN, "--data_root={place}", f"--run_dir={{place}}/{LONG}"),
    "long name of data": (*TRAIN, f"--gin_bindings=train_fn.dataset_name = '{LONG}'", "--data_root={place}"),
    "no folder": (*TRAIN, "--data_root={place}", "--run_dir={place}/r.csv/run"),
    "not UTF-8": (*TRAIN, "--data_root={place}", f"--run_dir={{place}}/{ODD}"),
    "gin file is a pipe": ("main.py", "--gin_config_file={place}/pipe"),
    "long name of a gin file": ("main.py", f"--gin_config_file={LONG}"),
    "plug-in is a pipe": ("main.py", "--plugin={place}/pipe", "--list=encoders"),
    "metrics are a pipe": (*TRAIN, "--data_root={place}", "--run_dir={place}/run"),
    "run is a file": ("main.py", "--mode=evaluate", "--run_dir={place}/r.csv"),
    "checkpoint is a pipe": ("main.py", "--mode=evaluate", "--run_dir={place}/old"),
    "predict from a long name": ("main.py", "--mode=predict", f"--run_dir={LONG}"),
    "raw file is a pipe": (*CSV, "--data_root={place}/out", "--raw_path={place}/pipe"),
    "raw name too long": (*CSV, "--data_root={place}/out", f"--raw_path={LONG}"),
    "raw name not UTF-8": (*CSV, "--data_root={place}/out", f"--raw_path={{place}}/{ODD}.csv"),
    "raw part not UTF-8": (*CSV, "--data_root={place}/out", "--raw_path={place}/parts"),
    "result in a file": (*CSV, "--data_root={place}/r.csv", "--raw_path={place}/r.csv"),
    "empty name": (*CSV, "--data_root=", "--raw_path={place}/r.csv"),
    "long result": (*CSV[:3], f"--name={LONG}", "--data_root={place}/out", "--raw_path={place}/r.csv"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_reports_one_line_error(place: Path, case: str) -> None:
    script, *arguments = (each.replace("{place}", str(place)) for each in FAULTS[case])
    done = run_program(script, *arguments, timeout=60)
    check(done)


def check(done: CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert not done.stdout


def at_start(limit: Callable[[], None]) -> None:
    """Runs the program with a limit that is set after its imports."""
    whole = app.run

    def limited(*arguments, **named) -> None:
        limit()
        whole(*arguments, **named)

    app.run = limited


def few_files() -> None:
    """No further file can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_start(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1])))


def nobody() -> None:
    """A user who may read and write nothing here; root is asked for no permission."""
    at_start(lambda: os.seteuid(65534))


@pytest.mark.parametrize("before", [few_files, nobody])
def test_what_the_system_refuses_reports_one_line_error(place: Path, before: Callable[[], None]) -> None:
    if before is nobody and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    root, raw = f"--data_root={place}", f"--raw_path={place}/r.csv"
    runs = (
        (*CSV, f"--data_root={place}/out", raw),
        ("main.py", "--mode=evaluate", root, f"--run_dir={place}/old"),
    )
    for script, *arguments in runs:
        check(run_program(script, *arguments, timeout=60, before=before))


def nobody_reads() -> None:
    """Standard output is a pipe whose reader has left, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def nobody_reads_at_all() -> None:
    """Of ``2>&1 | head`` too."""
    nobody_reads()
    os.dup2(1, 2)


def test_a_reader_that_leaves_early_stops_nothing(place: Path, tmp_path: Path) -> None:
    for script, *arguments in (
        ("main.py", "--list=encoders"),
        ("preprocess_public_data.py", "--list"),
        (*CSV, f"--data_root={tmp_path}", f"--raw_path={place}/r.csv", f"--export_text={tmp_path}/text"),
        (*TRAIN, f"--data_root={place}", f"--run_dir={tmp_path}/run"),
    ):
        done = run_program(script, *arguments, before=nobody_reads)
        assert done.returncode == 0, done.stderr
        assert "rror" not in done.stderr and "Broken" not in done.stderr
    assert (tmp_path / "text").exists()
    script, *arguments = (*TRAIN, f"--data_root={place}", f"--run_dir={tmp_path}/other")
    assert run_program(script, *arguments, before=nobody_reads_at_all).returncode == 0
    assert "test, full catalogue" in (tmp_path / "run" / "train.log").read_text()
