"""main.py --mode=export on a run of release 0.1.0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from generative_recommenders import Recommender
from programs import run_program

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RELEASE / "runs" / "sasrec", tmp_path / "run")
    return tmp_path / "run"


def export(run: Path, form: str, *flags: str):
    return run_program("main.py", "--mode=export", f"--run_dir={run}", f"--format={form}", *flags)


def test_states_and_items_score_as_the_recommender(run: Path, tmp_path: Path) -> None:
    for form in ("torch", "safetensors"):
        done = export(run, form)
        assert done.returncode == 0, done.stderr
    folder = run / "export"
    assert {path.name for path in folder.iterdir()} == {
        "query_encoder.pt2", "item_embeddings.safetensors", "item_ids.txt", "export.json",
    }  # fmt: skip
    about = json.loads((folder / "export.json").read_text())
    assert set(about["formats"]) == {"torch", "safetensors"}  # one does not forget the other
    assert list(about["formats"]["torch"]["inputs"]) == ["item_ids", "lengths"]
    items = safetensors.torch.load_file(folder / "item_embeddings.safetensors")["item_embeddings"]
    names = (folder / "item_ids.txt").read_text().splitlines()
    rec = Recommender.load(run)
    history = names[3:6]
    encoder = torch.export.load(folder / "query_encoder.pt2").module()
    states = encoder(torch.tensor([[4, 5, 6]]), torch.tensor([3]))
    temperature = rec.model.similarity.temperature
    best = (states @ items.T / temperature)[0].topk(5)
    answer = rec.recommend({"a": history}, k=5, exclude_seen=False)
    assert answer["item_id"].tolist() == [names[i] for i in best.indices.tolist()]
    assert answer["score"].tolist() == pytest.approx(best.values.tolist(), abs=1e-4)


def test_items_as_parquet(run: Path, tmp_path: Path) -> None:
    assert export(run, "parquet", f"--output={tmp_path / 'out'}").returncode == 0
    table = pq.read_table(tmp_path / "out" / "item_embeddings.parquet")
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert table["item_id"].to_pylist() == (tmp_path / "out" / "item_ids.txt").read_text().splitlines()
    assert table["embedding"].type.list_size == about["width"] and len(table) == about["items"]


def test_flags_without_effect_report_one_line_error(run: Path) -> None:
    done = export(run, "torch", "--resume")
    assert done.returncode == 2
    assert "--resume cannot go with --mode=export" in done.stderr.splitlines()[-1]
