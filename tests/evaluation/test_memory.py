"""Memory of an evaluation with one very long history."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.evaluator import Evaluator
from generative_recommenders.evaluation.list_metrics import TopLists
from generative_recommenders.evaluation.seen_filters import HistoryFilter
from memory import memory_grows_at_most
from tiny_data import tiny_dataset

LONG, ITEMS = 150_000, 300


def evaluate(folder: Path) -> None:
    dataset = SequenceDataset.open(folder)
    loader = EvaluationLoader(dataset, make_split(dataset).test_targets, 20, 512)
    evaluator = Evaluator(loader, ITEMS, HistoryFilter(), Collectives())
    with memory_grows_at_most(64):  # padded to the longest history, ids alone would take 600 MB
        evaluator(lambda batch: torch.zeros(len(batch["user_ids"]), ITEMS), TopLists(10, ITEMS))


def test_one_long_history_costs_its_own_events_alone(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sequences = [np.resize(np.arange(1, ITEMS + 1), LONG).tolist()]
    sequences += generator.integers(1, ITEMS + 1, (600, 6)).tolist()
    tiny_dataset(tmp_path, sequences)
    # A process of its own: the peak of this one may be high already.
    process = multiprocessing.get_context("spawn").Process(target=evaluate, args=(tmp_path / "tiny",))
    process.start()
    process.join(100)
    assert process.exitcode == 0
