"""examples/from_replay.py trains, measures and recommends; needs the extra ``lightning``."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    raw.mkdir()
    # MovieLens-100K's layout: users who go through 60 items in order, from places of their own.
    events = [(user, 1 + (user * 7 + n) % 60, 4, 881250949 + n) for user in range(1, 301) for n in range(25)]
    (raw / "u.data").write_text("".join("\t".join(map(str, event)) + "\n" for event in events))
    script = runpy.run_path(str(ROOT / "examples" / "from_replay.py"))
    metrics, recommendations = script["main"](tmp_path, raw, max_epochs=2, limit=20)
    assert 0 < metrics["recall@10"] <= 1 and metrics["ndcg@10"] <= metrics["recall@10"]
    assert recommendations.groupby("query_id").size().max() == 10
    assert list(recommendations.columns) == ["query_id", "item_id", "rating"]
