"""Users' values against their definitions, and the paired comparison of two runs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from generative_recommenders.commands.comparison import (
    METRICS,
    compare,
    comparison_table,
    mean_over_runs,
    user_values,
)
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.metrics import RankHistogram
from programs import run_program

RELEASE = Path(__file__).parents[1] / "compatibility" / "v0_1_0"


def ranks(of: dict[str, int | None], item: str = "i") -> pl.DataFrame:
    return pl.DataFrame({"user_id": [*of], "item_id": [item] * len(of), "rank": [*of.values()]})


def test_values_of_users() -> None:
    frame = ranks({"a": 1, "b": 3, "c": 10, "d": 11, "e": None})
    assert user_values(frame, "hr@10", 20)["value"].to_list() == [1, 1, 1, 0, 0]
    gains = [1, 1 / math.log2(4), 1 / math.log2(11), 0, 0]
    assert user_values(frame, "ndcg@10", 20)["value"].to_list() == pytest.approx(gains)
    assert user_values(frame, "mrr", None)["value"].to_list() == pytest.approx([1, 1 / 3, 1 / 10, 1 / 11, 0])


def test_means_over_users_are_those_of_the_table() -> None:
    found = [1, 3, 10, 12, None]
    histogram = RankHistogram(12)
    histogram.add(torch.tensor([13 if rank is None else rank for rank in found]))
    frame = ranks(dict(zip("abcde", found)))
    for metric in METRICS:
        mean = user_values(frame, metric, 12)["value"].mean()
        assert mean == pytest.approx(histogram.compute((10,))[metric]), metric
    line = comparison_table(frame, frame, ("x", "y"), 12).splitlines()[-1]
    assert line.split()[:2] == ["mrr", f"{histogram.compute()['mrr']:.4f}"]


def test_users_are_matched_by_id_and_seeds_averaged() -> None:
    seeds = [user_values(ranks(each), "hr@10", 99) for each in ({"a": 1, "b": 99}, {"b": 1, "a": 1})]
    first = mean_over_runs(seeds)
    assert dict(zip(first["user_id"], first["value"])) == {"a": 1.0, "b": 0.5}
    second = user_values(ranks({"c": 1, "b": 1, "a": 50}), "hr@10", 99)
    found = compare(first, second, ("x", "y"))
    assert (found.users, found.first, found.second) == (2, 0.75, 0.5)
    assert 0 < found.p <= 1


def test_what_does_not_compare() -> None:
    first = user_values(ranks({"a": 1}), "mrr", 9)
    with pytest.raises(UserError, match="x and y have no test user in common"):
        compare(first, user_values(ranks({"b": 1}), "mrr", 9), ("x", "y"))
    with pytest.raises(UserError, match="other test targets for 1 of 1 users, as for 'a'"):
        compare(first, user_values(ranks({"a": 1}, "j"), "mrr", 9), ("x", "y"))


def test_main_compares_two_runs(tmp_path: Path) -> None:
    shutil.copytree(RELEASE / "prepared", tmp_path / "data" / "prepared")
    names = sorted(path.name for path in (RELEASE / "runs").iterdir())[:2]
    for name in names:
        shutil.copytree(RELEASE / "runs" / name, tmp_path / name)
    given = [f"--data_root={tmp_path / 'data'}", f"--run_dir={tmp_path / names[0]}"]
    for other, p in ((names[0], "1.0000"), (names[1], "")):
        done = run_program("main.py", "--mode=evaluate", f"--compare={tmp_path / other}", *given)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("ndcg@10"))
        assert line.endswith(p) and f"against {tmp_path / other}" in done.stdout
