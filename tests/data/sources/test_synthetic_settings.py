"""Flags and settings of the synthetic books."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from generative_recommenders.commands import preprocess
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.data.sources.synthetic_catalogue import make_catalogue
from generative_recommenders.errors import UserError


def _preprocess(*arguments: str) -> None:
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["program", *arguments])
        preprocess.run([])


def test_lengths_are_flags(tmp_path: Path) -> None:
    lengths = ["--synthetic_min_length=2", "--synthetic_mean_length=4.5"]
    _preprocess(f"--data_root={tmp_path}", "--synthetic_users=500", "--synthetic_items=50", *lengths)
    raw = tmp_path / "raw" / "synthetic-books"
    settings = json.loads((raw / "settings.json").read_text())
    assert (settings["min_length"], settings["mean_length"]) == (2, 4.5)
    of_user = Counter(row[0] for row in csv.reader((raw / "ratings.csv").open()))
    assert min(of_user.values()) == 2 and sum(of_user.values()) / 500 == pytest.approx(4.5, rel=0.15)


@pytest.mark.parametrize(("flags", "line"), [
    (["--synthetic_min_length=0"], "min_length = 0 is out of range, 1 to 200"),
    (["--synthetic_min_length=201"], "min_length = 201 is out of range, 1 to 200"),
    (["--synthetic_mean_length=2.75"], "mean_length = 2.75 is out of range, min_length = 6 to 200"),
    (["--synthetic_mean_length=nan"], "mean_length = nan is out of range"),
    (["--synthetic_mean_length=1e9"], "mean_length = 1000000000.0 is out of range"),
])  # fmt: skip
def test_length_flags_that_cannot_act_are_named(tmp_path: Path, flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        _preprocess(f"--data_root={tmp_path}", *flags)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [
    {"num_users": 0}, {"num_items": 3}, {"predictability": 1.1}, {"interleaving": -0.1}, {"min_length": 0},
    {"mean_length": 3.0}, {"seed": -1},
])  # fmt: skip
def test_settings_out_of_range_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        SyntheticBooksSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_items", [10, 11, 50, 5_001])
@pytest.mark.parametrize("seed", range(5))
def test_catalogues_of_any_size(num_items: int, seed: int) -> None:
    catalogue = make_catalogue(num_items, seed)
    assert len(set(catalogue.ids.to_pylist())) == num_items
    assert catalogue.popularity.sum() == pytest.approx(1) and catalogue.features().num_rows == num_items
    assert (catalogue.successor != np.arange(num_items)).all()
