"""Popularity and Markov baselines, and their ranks, against plain counts."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.splits import training_events
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.baselines import MarkovSuccessor, MostPopular, OwnScores, SharedScores
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems


def random_columns(seed: int, users: int = 30, items: int = 12):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stops = np.minimum(rng.integers(0, 9, users), lengths).astype(np.int32)
    return rng.integers(1, items + 1, offsets[-1]).astype(np.int32), offsets, stops, items


def sequences(items, offsets, stops):
    return [items[start : start + stop].tolist() for start, stop in zip(offsets[:-1], stops)]


def order_of(model: MostPopular | MarkovSuccessor, history: list[int], num_items: int) -> list[int]:
    """All items by their rank, each asked for as the target of a user with this history."""
    targets = torch.arange(1, num_items + 1)
    batch = {
        "item_ids": torch.tensor([[*history, 0, 0]]).expand(num_items, -1),
        "lengths": torch.full((num_items,), len(history)),
    }
    return (model.ranks(batch, targets, None).argsort() + 1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_most_popular_counts_training_events_only(seed):
    items, offsets, stops, count = random_columns(seed)
    popular = Counter(i for sequence in sequences(items, offsets, stops) for i in sequence)
    model = MostPopular(items, offsets, stops, count)
    expected = sorted(range(1, count + 1), key=lambda i: (-popular[i], i))
    assert order_of(model, [], count) == order_of(model, [3, 1], count) == expected


@pytest.mark.parametrize("seed", range(6))
def test_markov_orders_by_successor_count_then_popularity_then_id(seed):
    items, offsets, stops, count = random_columns(seed)
    rows = sequences(items, offsets, stops)
    popular = Counter(i for row in rows for i in row)
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    model = MarkovSuccessor(items, offsets, stops, count)
    for last in range(1, count + 1):
        expected = sorted(range(1, count + 1), key=lambda i: (-pairs[last, i], -popular[i], i))
        assert order_of(model, [3, 1, last], count) == expected


def test_markov_reads_the_last_real_item_of_each_row():
    items = np.array([1, 2, 3, 4, 3, 4], dtype=np.int32)
    model = MarkovSuccessor(items, np.array([0, 2, 4, 6]), np.array([2, 2, 2]), 4)
    batch = {
        "item_ids": torch.tensor([[3, 1, 0], [1, 3, 0], [3, 1, 3], [0, 0, 0]]),
        "lengths": torch.tensor([2, 2, 3, 0]),
    }
    assert model.ranks(batch, torch.tensor([2, 4, 4, 3]), None).tolist() == [1, 1, 1, 1]
    # After the successor come the others by popularity, 3 and 4 (two events each) before 1 and 2.
    assert model.ranks(batch, torch.tensor([3, 3, 1, 1]), None).tolist() == [2, 2, 3, 3]


def test_markov_pairs_never_cross_users():
    model = MarkovSuccessor(np.array([1, 2], dtype=np.int32), np.array([0, 1, 1, 2, 2]), np.array([1, 0, 1, 0]), 2)
    assert len(model.successors) == 0


def test_markov_order_survives_large_counts():
    items = np.array([1, 2] * 40_000 + [1, 3] * 40_000 + [3], dtype=np.int32)
    offsets = np.array([0, 80_000, 160_000, 160_001])
    model = MarkovSuccessor(items, offsets, np.array([80_000, 80_000, 1]), 3)
    assert order_of(model, [1], 3)[0] == 3


def test_without_training_events_all_scores_are_equal():
    model = MarkovSuccessor(np.array([1, 2], dtype=np.int32), np.array([0, 2]), np.array([0]), 3)
    assert order_of(model, [1, 2], 3) == [1, 2, 3]


def test_a_split_of_another_dataset_is_refused():
    with pytest.raises(UserError, match="train_stops"):
        training_events(np.array([0, 3]), np.array([4]))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_shared_scores_rank_like_all_scores_written_out(seed: int, items: int, levels: int, filtered: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shared = draw(0, levels, items).float()
    rows, columns = (torch.rand(9, items, generator=generator) < 0.3).nonzero(as_tuple=True)
    # Halves lie between the shared scores, whole numbers among them.
    own = OwnScores(rows, columns + 1, draw(0, 2 * levels, len(rows)).float() / 2)
    scores = shared.repeat(9, 1)
    scores[rows, columns] = own.values
    targets = draw(0, items + 2, 9)
    seen = SeenItems.padded(draw(0, items + 1, 9, 4), items) if filtered else None
    assert torch.equal(SharedScores(shared).ranks(targets, own, seen), exact_ranks(scores, targets, seen))
    alone = exact_ranks(shared.repeat(9, 1), targets, seen)
    assert torch.equal(SharedScores(shared).ranks(targets, None, seen), alone)
