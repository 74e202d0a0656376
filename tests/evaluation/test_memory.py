"""Memory of an evaluation with one very long history, and of the lists of many users."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.evaluator import Evaluator
from generative_recommenders.evaluation.list_metrics import TopLists
from generative_recommenders.evaluation.seen_filters import HistoryFilter, SeenItems
from memory import memory_grows_at_most
from tiny_data import tiny_dataset

LONG, ITEMS = 150_000, 300


def evaluate(folder: Path) -> None:
    dataset = SequenceDataset.open(folder)
    loader = EvaluationLoader(dataset, make_split(dataset).test_targets, 20, 512)
    evaluator = Evaluator(loader, ITEMS, HistoryFilter(), Collectives())
    lists = TopLists(10, ITEMS, torch.from_numpy(loader.users) + 1)
    with memory_grows_at_most(64):  # padded to the longest history, ids alone would take 600 MB
        evaluator(lambda batch: torch.zeros(len(batch["user_ids"]), ITEMS), lists)


def collect_lists() -> None:
    users, targets = torch.arange(200_000), torch.zeros(512, dtype=torch.int64)
    ids = torch.arange(1, 101).repeat(512, 1)
    lists = TopLists(100, 100, users)
    with memory_grows_at_most(64):  # all lists would take 160 MB
        for some in users.split(512):
            lists.add_lists(ids[: len(some)], some, targets[: len(some)], SeenItems.none())


def passes_alone(function: Callable[..., None], *arguments: Path) -> None:
    """Asserts it in a process of its own: the peak of this one may be high already."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(100)
    assert process.exitcode == 0


def test_one_long_history_costs_its_own_events_alone(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sequences = [np.resize(np.arange(1, ITEMS + 1), LONG).tolist()]
    sequences += generator.integers(1, ITEMS + 1, (600, 6)).tolist()
    tiny_dataset(tmp_path, sequences)
    passes_alone(evaluate, tmp_path / "tiny")


def test_lists_of_many_users_are_not_all_kept() -> None:
    passes_alone(collect_lists)
