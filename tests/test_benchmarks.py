"""Benchmarks: each runs from any folder and prints its result as JSON in the last line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from programs import ROOT, run_program

BENCHMARKS = ROOT / "benchmarks"
TINY = {
    "catalogue_loss": ["--tokens=300", "--items=500", "--dim=8"],
    "compare_peers": [
        *("--environments=peers", "--peers", "--encoders", "SASRec"),
        *("--users=30", "--items=50", "--rounds=1"),
    ],
    "epoch": ["--users=60", "--num_items=50", "--gin_bindings=train_fn.max_sequence_length=20"],
    "evaluate": ["--users=600", "--items=700", "--dim=8", "--seen=3"],
    "gpu": ["--device=cpu", "--quick", "--output=results/gpu.json"],
    "incremental": ["--rows=2", "--length=8", "--repeats=1"],
    "jagged": ["--repeats=4"],
    "large_catalogue": ["--items=3000", "--users=400", "--steps=2", "--eval_users=50"],
    "long_run": ["--steps=100", "--samples=10"],
    "prepare": ["--lines=2000"],
    "recommend": [
        "--users=4",
        "--items=300",
        "--one_user_items=300",
        "--dim=8",
        "--repeats=1",
        "--one_user_repeats=1",
    ],
    "report": ["--out=."],
    "serve": ["--items=30", "--length=4", "--repeats=1"],
    "serve_load": ["--items=30", "--length=4", "--requests=20", "--clients", "1", "4"],
    "startup": ["--rounds=1", "--users=300"],
    "top_k": ["--items=300", "--queries=4", "--k=5", "--dim=16", "--fit_steps=2", "--repeats=1"],
    "train_step": [
        "--users=60",
        "--batch_size=8",
        "--steps=1",
        "--num_negatives=4",
        "--plain_steps=1",
        "--evaluations=1",
    ],
}
POSITIVE = {
    "catalogue_loss": ("seconds", "products_seconds", "ratio"),
    "compare_peers": ("results.SASRec.ours.step", "results.SASRec.ours.epoch"),
    "epoch": ("seconds", "training_seconds", "products_seconds", "tokens_per_second", "peak_rss_mb"),
    "evaluate": ("users_per_second", "ratio"),
    "gpu": ("parity.tolerance", "steps.HSTU-large.step_ms", "epochs.epochs_measured"),
    "incremental": ("results.SASRec.scratch_ms", "results.HSTU.append_ms"),
    "jagged": ("setup.repeats",),
    "large_catalogue": ("step_seconds", "eval_users_per_second", "peak_mb.resume"),
    "long_run": ("first_settled_mb", "highest_mb"),
    "prepare": ("seconds", "peak_rss_mb", "counts.users"),
    "recommend": (
        "results.many_users.milliseconds.search.median",
        "results.one_user.search_to_products.median",
    ),
    "report": ("rows",),
    "serve": ("results.eager.batch_1_ms", "results.eager.batch_32_ms"),
    "serve_load": ("results.clients_1.p50_ms", "results.clients_4.per_second"),
    "startup": ("help_seconds", "help_ratio", "first_step_seconds", "first_step_ratio"),
    "top_k": ("results.MoLBruteForceTopK.search_seconds", "results.MoLNaiveTopK50.recall"),
    "train_step": (
        "step_seconds",
        "tokens_per_second",
        "data_seconds",
        "peak_rss_mb",
        "plain_step_seconds",
        "evaluation_seconds",
        "evaluation_products_seconds",
        "products_seconds",
        "bytes_seconds",
    ),
}
NEEDED = {"serve_load": ("fastapi", "uvicorn", "prometheus_client")}
NO_PROGRAMS = {"floors", "gpu_setup", "made_data", "plain_step", "records", "timing", "untrained"}


def small_copies() -> None:
    """The rate of a copy is that of 1 MiB, not of what no cache holds."""
    sys.path.insert(0, str(BENCHMARKS))
    import floors

    floors.copied_gb_a_second = partial(floors.copied_gb_a_second, megabytes=1)


def run(name: str, arguments: list[str], folder: Path) -> dict:
    done = run_program(f"benchmarks/{name}.py", *arguments, folder=folder, before=small_copies)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_benchmark_is_run() -> None:
    programs = {path.stem for path in BENCHMARKS.glob("*.py")} - NO_PROGRAMS
    assert programs == TINY.keys()


@pytest.mark.parametrize("name", sorted(TINY))
def test_it_prints_json(name: str, tmp_path: Path) -> None:
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    result = run(name, TINY[name], tmp_path)
    for path in POSITIVE[name]:
        value = result
        for key in path.split("."):
            value = value[key]
        assert value > 0, path
    stamped = result["machine"] if name == "gpu" else result
    assert stamped["benchmark"] == name and {"date", "commit", "torch", "cores", "load_before"} <= stamped.keys()


def test_a_gpu_that_is_not_in_use_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of = runpy.run_path(str(BENCHMARKS / "timing.py"))["seconds_of"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("made a context on the GPU"))
    assert len(seconds_of(lambda: None, 2)) == 2


def without_git() -> None:
    os.environ["PATH"] = ""


def test_a_record_where_there_is_no_git(tmp_path: Path) -> None:
    done = run_program("benchmarks/report.py", "--out=.", f"--results={tmp_path}", folder=tmp_path, before=without_git)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["commit"] is None


@pytest.mark.slow
def test_a_catalogue_in_shards(tmp_path: Path) -> None:
    result = run("large_catalogue", [*TINY["large_catalogue"], "--processes=2", "--eval_users=5000"], tmp_path)
    assert result["processes"] == 2 and result["step_seconds"] > 0
    # of the users that there are
    assert result["eval_users_per_second"] * result["seconds"]["evaluation"] == pytest.approx(400, rel=0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a program's own peak")
def test_the_peak_of_preparation_is_not_that_of_the_program_that_started_it() -> None:
    held = bytearray(b"\1") * (3 << 28)
    code = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport prepare\nprint(prepare.peak_kibibytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10 << 10 < int(done.stdout) < len(held) >> 10


def test_an_epoch_takes_no_flag_of_a_step(tmp_path: Path) -> None:
    done = run_program("benchmarks/epoch.py", "--encoder=HSTU", "--users=60", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("--encoder: of train_step.py alone")


def test_steps_of_a_configuration(tmp_path: Path) -> None:
    config = f"--gin_config_file={ROOT / 'configs/ml-1m/gsasrec.gin'}"
    bindings = ["--gin_bindings=train_fn.local_batch_size = 4", "--gin_bindings=train_fn.num_negatives = 5"]
    result = run("train_step", [config, *bindings, "--users=150", "--steps=1"], tmp_path)
    assert (result["loss"], result["batch_size"], result["num_negatives"]) == ("gBCE", 4, 5)
    done = run_program("benchmarks/train_step.py", config, "--encoder=HSTU", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("--encoder: not beside --gin_config_file")


def test_steps_of_a_catalogue_of_books(tmp_path: Path) -> None:
    choices = [
        "--profile=amzn-books",
        "--num_items=30000",
        "--users=150",
        "--batch_size=8",
        "--steps=1",
        "--num_negatives=4",
    ]
    result = run("train_step", [*choices, "--encoder=LiGR", "--loss=BCESampled"], tmp_path)
    assert (result["num_items"], result["loss"], result["step_seconds"] > 0) == (30000, "BCESampled", True)
