"""Dependence of a data set's scores on the order of events: is it sequential at all?

A baseline and a small model learn the true order and predict the last item from histories in true and in shuffled
order. Where both do as well, the order of events says nothing about what comes next (Klenitskiy et al., "Does It Look
Sequential?", arXiv 2408.12008).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import EvaluationLoader, SequenceLoader
from generative_recommenders.data.preparation.event_store import consecutive
from generative_recommenders.data.splits import Split, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.progress import progress_bar
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.baselines import BASELINES
from generative_recommenders.evaluation.evaluator import Evaluator, Ranker, Score
from generative_recommenders.evaluation.model_evaluation import catalogue_scores
from generative_recommenders.evaluation.seen_filters import HistoryFilter, NoFilter

MOST_USERS, MOST_EVENTS, STEPS, SHUFFLES, SEED = 10_000, 200, 1_000, 3, 0
METRIC = "ndcg@10"


@dataclasses.dataclass(frozen=True)
class OrderDependence:
    """users: how many were asked, ``sampled`` of all where fewer. seen_filter: "history", or "none" where targets
    repeat.
    scores: NDCG@10 by method, ``true`` and ``shuffled`` order, the latter the mean of `SHUFFLES` shuffles."""

    users: int
    sampled: bool
    steps: int
    seen_filter: str
    scores: dict[str, dict[str, float]]


def order_dependence(dataset: SequenceDataset, steps: int | None = None) -> OrderDependence:
    """NDCG@10 on true and on shuffled histories; UserError where no user has three events.

    At most `MOST_USERS` users, drawn at random, with their last `MOST_EVENTS` events, so that neither time nor memory
    grows with the data set; the catalogue is what these users have.
    """
    steps = STEPS if steps is None else steps
    rng = np.random.default_rng(SEED)
    scored = np.flatnonzero(dataset.lengths >= 3)
    if not len(scored):
        raise UserError(f"{dataset.folder}: no user has three events: there is nothing to predict")
    users = np.sort(rng.choice(scored, min(len(scored), MOST_USERS), replace=False))
    data = of_users(dataset, users)
    split = make_split(data)
    repeats = split.counts["repeated_test_targets"] > 0.01 * split.counts["test_users"]
    columns = (data.items, data.offsets, split.train_stops, data.num_items)
    methods: dict[str, Score | Ranker] = {
        **{name: kind(*columns) for name, kind in BASELINES.items()},
        "SASRec": _trained_scores(data, split, steps),
    }
    histories = {"true": [data], "shuffled": [shuffled(data, split, rng) for _ in range(SHUFFLES)]}
    scores: dict[str, dict[str, float]] = {name: {} for name in methods}
    missed = torch.from_numpy(split.unseen_test_targets)
    for order, variants in histories.items():
        loaders = [EvaluationLoader(each, split.test_targets, _LENGTH, 512) for each in variants]
        seen, every = NoFilter() if repeats else HistoryFilter(), Collectives()
        evaluators = [Evaluator(each, data.num_items, seen, every, missed) for each in loaders]
        for name, score in methods.items():
            values = [evaluate(score).metrics()[METRIC] for evaluate in evaluators]
            scores[name][order] = float(np.mean(values))
    sampled = len(users) < len(scored)
    return OrderDependence(len(users), sampled, steps, "none" if repeats else "history", scores)


def of_users(dataset: SequenceDataset, users: np.ndarray) -> SequenceDataset:
    """The items of some users ``[n]``, numbered anew, in memory: at most the last `MOST_EVENTS` of each, no other
    column."""
    lengths = np.minimum(dataset.lengths[users], MOST_EVENTS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = consecutive(dataset.offsets[users + 1] - lengths, lengths)
    known, items = np.unique(dataset.items[places], return_inverse=True)
    counts = {"users": len(users), "items": len(known), "events": len(items)}
    manifest = dataclasses.replace(
        dataset.manifest,
        counts={**dataset.manifest.counts, **counts},
        has_ratings=False,
        has_timestamps=False,
        event_columns=[],
        features=[],
    )
    return SequenceDataset(Path(), manifest, (items + 1).astype(np.int32), None, None, offsets)


def shuffled(dataset: SequenceDataset, split: Split, rng: np.random.Generator) -> SequenceDataset:
    """The same users with the events before each test target in random order."""
    owners = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    keys = rng.random(dataset.num_events)
    scored = split.test_targets >= 0
    keys[(dataset.offsets[:-1] + split.test_targets)[scored]] = 1.0  # stays the last
    return dataclasses.replace(dataset, items=dataset.items[np.lexsort((keys, owners))])


_LENGTH, _BATCH_SIZE, _LEARNING_RATE = 50, 128, 1e-3


def _trained_scores(dataset: SequenceDataset, split: Split, steps: int) -> Score:
    """A SASRec of width 64 after some steps of Adam."""
    settings = RunSettings().bind(
        {
            "train_fn.max_sequence_length": _LENGTH,
            "train_fn.random_seed": SEED,
            "train_fn.item_embedding_dim": 64,
            "train_fn.item_l2_norm": True,
            "train_fn.sampling_strategy": "local",
            "train_fn.negatives_sharing": "block",
            "train_fn.num_negatives": 512,
        }
    )
    task = build_task(settings, Catalogue.of(dataset, split.train_stops))
    optimizer = torch.optim.Adam(task.parameters(), lr=_LEARNING_RATE)
    loader = SequenceLoader(dataset, split.train_stops, _LENGTH, _BATCH_SIZE, SEED)
    batches = (batch for epoch in range(steps) for batch in loader.epoch(epoch))
    for step, batch in progress_bar(zip(range(steps), batches), steps, "a small model"):
        loss = task.loss(batch, step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.model.eval()
    return catalogue_scores(task.model)
