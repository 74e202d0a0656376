"""Options, paths, logging, one thread and tiny prepared data sets, for all tests."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are defined, by whichever test imports them first

from disks import disk
from generative_recommenders.data.store import SequenceDataset
from tiny_data import ragged_sequences, tiny_dataset

LONG_FILES = (
    "test_code_blocks.py",
    "test_benchmarks.py",
    "test_faults.py",
    "test_reproduction.py",
    "test_same_numbers.py",
    "test_sharded_table.py",
    "test_ablation.py",
    "test_encoder_contract.py",
    "test_scripts_and_notebooks.py",
    "test_main.py",
    "test_program.py",
    "test_extreme_values.py",
    "test_configs.py",
    "test_launch.py",
    "test_rendezvous.py",
    "test_fine_tuning.py",
    "test_recommender.py",
    "test_report.py",
    "test_one_score.py",
)
"""The longest first, so that no process ends with one of them alone."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with disk(tmp_path / "disk", "size=256k") as folder:
        yield folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run_slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--run_slow"):
        reasons["slow"] = "needs --run_slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs CUDA"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that runs a program in this process sets up logging: the next test finds it as it was, warnings on, and
    absl's lines reach caplog."""
    root, logger = logging.getLogger(), logging.getLogger("absl")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    handlers, levels = list(root.handlers), (root.level, logger.level)
    logger.setLevel(logging.WARNING)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    logger.setLevel(levels[1])


@pytest.fixture(scope="session")
def ragged_dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """57 users with 1 to 40 events over 30 items, with ratings and times; the same in every run."""
    return tiny_dataset(tmp_path_factory.mktemp("ragged"), ragged_sequences(57, 30, seed=5))
