"""``train_fn.list_metrics_k`` through the program: printed, recorded, equal however many processes score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from generative_recommenders.config.sections import EvaluationSettings
from generative_recommenders.errors import UserError
from generative_recommenders.run.summary import list_metrics_lines
from programs import forked_members, run_program
from tiny_data import ragged_sequences, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "recall", "precision", "ndcg", "map", "mrr", "hr", "novelty", "coverage", "popularity_bias", "diversity",
)  # fmt: skip
BINDINGS = {
    "dataset_name": "'tiny'",
    "max_sequence_length": 20,
    "item_embedding_dim": 8,
    "num_epochs": 1,
    "eval_batch_size": 8,
    "num_negatives": 4,
}


def main(data_root: Path, run: Path, *arguments: str, **bindings: object) -> str:
    """Runs main.py and gives what it prints."""
    given = [f"--gin_bindings=train_fn.{name} = {value}" for name, value in bindings.items()]
    flags = f"--data_root={data_root}", f"--run_dir={run}", *arguments, *given
    done = run_program("main.py", *flags, before=forked_members)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def printed(text: str) -> dict[str, float]:
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("recall@10"))
    return dict(zip(lines[at].split(), map(float, lines[at + 1].split())))


def table(text: str) -> list[str]:
    """The lines of the results table, list metrics included."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["hr@10"])
    stop = next(number for number, line in enumerate(lines) if line.startswith("data tiny"))
    return lines[start:stop]


def test_printed_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    tiny_dataset(tmp_path / "prepared", ragged_sequences(57, 30, seed=5))
    run = tmp_path / "run"
    trained = main(tmp_path, run, "--num_processes=2", **BINDINGS, list_metrics_k=10)
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    recorded = final["list_metrics"]
    assert list(recorded) == [f"{name}@10" for name in NAMES]
    assert recorded["recall@10"] == pytest.approx(final["results"]["SASRec"]["hr@10"])
    assert 0 < recorded["diversity@10"] < 1
    assert printed(trained) == pytest.approx(recorded, abs=1e-4)
    evaluated = main(tmp_path, run, "--mode=evaluate")
    assert any(line.startswith("SASRec, targets rated 4+") for line in table(trained))
    assert table(evaluated) == table(trained)


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="list_metrics_k"):
        EvaluationSettings(list_metrics_k=0)
    assert EvaluationSettings().list_metrics_k is None
    assert list_metrics_lines({}) == []
