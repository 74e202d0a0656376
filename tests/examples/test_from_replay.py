"""examples/from_replay.py trains, measures and recommends; needs the extra ``lightning``."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "examples" / "from_replay.py"))
    metrics, recommendations = script["main"](tmp_path, max_epochs=2, limit=20)
    assert 0 < metrics["recall@10"] <= 1 and metrics["ndcg@10"] <= metrics["recall@10"]
    assert recommendations.groupby("query_id").size().max() == 10
    assert list(recommendations.columns) == ["query_id", "item_id", "rating"]
