"""The ablation benchmark on tiny data: a row a gin file, and nothing trained twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from generative_recommenders.config.gin import load_settings
from programs import ROOT, run_program
from tiny_data import ragged_sequences, tiny_dataset

BINDINGS = (
    "train_fn.dataset_name = 'tiny'",
    "train_fn.item_embedding_dim = 8",
    "train_fn.max_sequence_length = 10",
    "train_fn.eval_interval = 1000",
)


def ablation(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [f"--data_root={folder}", f"--runs={folder / 'runs'}", *(f"--gin_bindings={b}" for b in BINDINGS)]
    return run_program("benchmarks/ablation.py", *given, *arguments)


def finished(run: Path, epochs: int) -> Path:
    """A run folder as main.py leaves it: its last epoch is its best, each took 3 seconds."""
    run.mkdir(parents=True)
    lines = [
        {"step": e, "part": "validation", "epoch": e, "seconds": 3.0 * (e + 1), "ndcg@10": e}
        for e in range(epochs)
    ]
    test = {"SASRec": {"ndcg@10": 0.25, "hr@10": 0.5}, "most popular": {"ndcg@10": 0.1, "hr@10": 0.2}}
    final = {"step": epochs, "part": "final", "model": "SASRec", "results": test, "peak_rss_mb": 1234}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, final]))
    config = ROOT / "configs" / "ablations" / "ml-1m-losses" / f"{run.name}.gin"
    resolved = load_settings([config], [*BINDINGS, f"train_fn.num_epochs = {epochs}"])[1]
    (run / "resolved.gin").write_text(resolved)
    return run


def test_trains_what_is_missing_and_tells_all(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    tiny_dataset(tmp_path / "prepared", ragged_sequences(57, 30, seed=5))
    before = finished(tmp_path / "runs" / "bce-n1", 1) / "metrics.jsonl"
    written = before.read_text()
    done = ablation(tmp_path, "--epochs=1", "--only=bce-n1,sce")
    assert done.returncode == 0, done.stderr[-2000:]
    *_, bce, sce, summary = done.stdout.splitlines()
    assert bce == "| bce-n1 | 0.2500 | 0.5000 | 3 | 1,234 | 1 |"
    assert before.read_text() == written
    rows = json.loads(summary)["rows"]
    assert [row["run"] for row in rows] == ["bce-n1", "sce"]
    assert sce.startswith(f"| sce | {rows[1]['ndcg@10']:.4f} | {rows[1]['hr@10']:.4f} |")
    assert rows[1]["peak_rss_mb"] > 50
    assert 0 < rows[1]["seconds_per_epoch"] < 100
    again = ablation(tmp_path, "--epochs=1", "--only=bce-n1,sce")
    assert again.stdout == done.stdout
    assert "epoch" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--only=ceee"], "ceee"), (["--only=ce", "--epochs=2"], "has 3 epochs, not 2")]
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    finished(tmp_path / "runs" / "ce", 3)
    done = ablation(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("whole", [True, False], ids=["finished", "interrupted"])
def test_the_run_of_another_sweep_is_refused(tmp_path: Path, whole: bool) -> None:
    """Its folder has the same name and other settings."""
    run = finished(tmp_path / "runs" / "sce", 1)
    resolved = (run / "resolved.gin").read_text()
    (run / "resolved.gin").write_text(
        resolved.replace("sasrec_encoder.num_blocks = 2", "sasrec_encoder.num_blocks = 3")
    )
    if not whole:
        first = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
        (run / "metrics.jsonl").write_text(first)
    before = (run / "metrics.jsonl").read_text()
    done = ablation(tmp_path, "--epochs=1", "--only=sce")
    assert done.returncode == 2 and not done.stdout
    assert "sasrec_encoder.num_blocks = 3" in done.stderr and done.stderr.count("\n") == 1
    assert (run / "metrics.jsonl").read_text() == before


def test_sweeps_have_folders_of_their_own(tmp_path: Path) -> None:
    program = "import sys; from benchmarks import ablation; ablation.flags.FLAGS(sys.argv); print(ablation.runs_folder())"
    given = (f"--configs=configs/ablations/{name}" for name in ("ml-1m-losses", "ml-1m-encoders"))
    command = [sys.executable, "-c", program]
    made = [subprocess.check_output([*command, each], cwd=ROOT, text=True).strip() for each in given]
    assert made == ["runs/ablation/ml-1m-losses", "runs/ablation/ml-1m-encoders"]
