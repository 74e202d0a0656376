"""Every setting and option under extreme values, through the program: it builds, or one line and exit code 2."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import pytest

import generative_recommenders.build.parts
import generative_recommenders.commands.train  # noqa: F401  (registers the built-in parts)
from generative_recommenders.commands.program import exit_code
from generative_recommenders.commands.setup import Options
from generative_recommenders.commands.train import dry_run_worker
from generative_recommenders.config import gin
from generative_recommenders.config.published import targets_in
from generative_recommenders.config.registry import DATA_SOURCES, REGISTRIES, Part, Registry
from generative_recommenders.config.schema import NAMES, RunSettings
from generative_recommenders.data.preparation.prepare import prepare_batches
from generative_recommenders.data.readers.events import RawRatings

EXTREME: list[Any] = [
    2**31, 2**63 - 1, -(2**63), 2**64, 1e39, -1e39, 1e-308, math.nan, math.inf, -math.inf, "", "x" * 100_000, "\0",
    "é" * 300,
    True, None, b"", [], [""], ["x" * 10_000], {}, {"": 1.0}, {"x": 1e30}, 1e30, 1e-30, -1, 0,
]  # fmt: skip
BESIDE = {
    "MoL": {"train_fn.top_k_method": "MoLBruteForceTopK"},
    "TwoTower": {"train_fn.negatives_sharing": "block"},
    "item_tower": {"train_fn.negatives_sharing": "block"},
    "categorical": {"train_fn.category_feature": "genre"},
    "multi-class": {"train_fn.class_feature": "genre"},
    "MoLBruteForceTopK": {"train_fn.interaction_module_type": "MoL"},
    "MoLNaiveTopK": {"train_fn.interaction_module_type": "MoL", "MoLNaiveTopK.k_per_group": 2},
    "MoLAvgTopK": {"train_fn.interaction_module_type": "MoL", "MoLAvgTopK.avg_top_k": 2},
    "MoLCombTopK": {
        "train_fn.interaction_module_type": "MoL",
        "MoLCombTopK.k_per_group": 2,
        "MoLCombTopK.avg_top_k": 2,
    },
}
"""What goes with a part."""
SMALL = {
    "train_fn.dataset_name": "tiny", "train_fn.max_sequence_length": 6, "train_fn.item_embedding_dim": 8,
    "train_fn.num_negatives": 4, "train_fn.local_batch_size": 4, "train_fn.sampling_strategy": "local",
    "create_mol_interaction_module.dot_product_dimension": 4, "train_fn.loss_module": "SampledSoftmaxLoss",
}  # fmt: skip


def choices() -> dict[str, dict[str, Any]]:
    """Every name that can be bound, and the settings under which it acts."""
    parts = [(r, part) for r in REGISTRIES.values() if r is not DATA_SOURCES for part in r.parts()]
    found: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    for registry, part in parts:
        for option in part.options.model_fields:
            found[f"{part.gin_name}.{option}"] = chosen(registry, part)
        for name in targets_in(part):
            found[name] = found[name] or chosen(registry, part)
    return found


def chosen(registry: Registry, part: Part) -> dict[str, Any]:
    return {registry.setting: part.name, **BESIDE.get(part.name, {})}


CHOICES = choices()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extreme")
    read = [[place % 12 for place in range(user, user + 6)] for user in range(12)]
    columns = {
        "user": [f"u{user:02}" for user, items in enumerate(read) for _ in items],
        "item": [f"i{item:02}" for items in read for item in items],
        "rating": pa.array([1 + item % 5 for items in read for item in items], pa.float32()),
        "timestamp": pa.array(range(72), pa.int64()),
    }
    features = pa.table(
        {"item": [f"i{item:02}" for item in range(12)], "genre": [f"g{item % 3}" for item in range(12)]}
    )
    raw = RawRatings("tiny", [root], item_features=features)
    prepare_batches(raw, [pa.table(columns).cast(pa.schema([
        ("user", pa.large_string()), ("item", pa.large_string()), ("rating", pa.float32()), ("timestamp", pa.int64()),
    ]))], root / "prepared" / "tiny", 1 << 30)  # fmt: skip
    return root


def run(settings: dict[str, Any], data_root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a dry run with these settings, bound without gin's text, which has no form for some."""
    monkeypatch.setattr(gin, "load_settings", lambda files, bindings: RunSettings().bind(settings))
    options = Options((), (), data_root, None, False, None, False, verbosity=-1)
    return exit_code(lambda: dry_run_worker(0, 1, options))


@pytest.mark.parametrize("name", CHOICES)
def test_extreme_values_build_or_report_one_line_error(
    name: str, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in EXTREME:
        started = perf_counter()
        code = run({**SMALL, **CHOICES[name], name: value}, data_root, monkeypatch)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) in {(0, 0), (2, 1)}, (str(value)[:50], str(lines)[:600])
        assert all(len(line) < 700 for line in lines), str(value)[:50]
        assert perf_counter() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


@pytest.mark.parametrize("settings", {str(each): each for each in CHOICES.values()}.values(), ids=str)
def test_what_is_tried_builds_as_it_is(
    settings: dict[str, Any],
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that the values above are refused for themselves."""
    assert run({**SMALL, **settings}, data_root, monkeypatch) == 0, capsys.readouterr().err
