"""Exact ranks against a sort: ties, seen items, NaN and infinite scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.evaluation.ranks import (
    count_ahead,
    exact_ranks,
    scores_of,
)
from generative_recommenders.evaluation.seen_filters import SeenItems


def slow_rank(scores: list[float], target: int, seen: list[int]) -> int:
    """Walk the catalogue best first, smaller ids first among equals, and count what is not seen."""
    if not 1 <= target <= len(scores) or target in seen:
        return len(scores) + 1
    candidates = [i for i in range(1, len(scores) + 1) if i not in seen]
    if np.isnan(scores[target - 1]):
        return len(candidates)
    order = sorted(candidates, key=lambda i: (np.isnan(scores[i - 1]), -scores[i - 1], i))
    return order.index(target) + 1


def padded(ids: torch.Tensor, items: int = 60) -> SeenItems:
    return SeenItems.padded(ids, items)


def random_case(seed: int, n: int = 40, items: int = 60, seen: int = 12, levels: int = 8):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (n, items), generator=generator).float()
    targets = torch.randint(0, items + 2, (n,), generator=generator)
    seen_ids = torch.randint(0, items + 1, (n, seen), generator=generator)
    return scores, targets, seen_ids


@pytest.mark.parametrize("items", [1, 7, 60, 2041])
@pytest.mark.parametrize("levels", [1, 5, 10_000])
def test_ranks_equal_a_sort(items, levels):
    scores, targets, seen = random_case(items + levels, items=items, levels=levels)
    expected = [slow_rank(*row) for row in zip(scores.tolist(), targets.tolist(), seen.tolist())]
    assert exact_ranks(scores, targets, padded(seen, items)).tolist() == expected
    expected = [slow_rank(s, t, []) for s, t in zip(scores.tolist(), targets.tolist())]
    assert exact_ranks(scores, targets).tolist() == expected


def test_more_columns_than_one_chunk_and_more_ties_than_a_byte_holds():
    scores = torch.zeros(3, 40_000)
    scores[1, 39_999] = 1.0
    targets = torch.tensor([40_000, 5, 1])
    assert exact_ranks(scores, targets).tolist() == [40_000, 6, 1]
    seen = padded(torch.tensor([[1, 1, 7], [40_000, 0, 6], [1, 2, 3]]), 40_000)
    assert exact_ranks(scores, targets, seen).tolist() == [39_998, 5, 40_001]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 61))
def test_counts_of_blocks_add_up_to_the_rank(seed, width):
    scores, targets, seen = random_case(seed, n=9)
    targets, seen = targets.clamp(1, 60), padded(seen)
    own = scores_of(scores, targets)
    blocks = range(0, 60, width)
    ahead = sum(count_ahead(scores[:, b : b + width], b + 1, own, targets, seen) for b in blocks)
    ranks = torch.where(seen.contains(targets), 61, 1 + ahead)
    assert torch.equal(ranks, exact_ranks(scores, targets, seen))


def test_repeated_seen_items_count_once_and_a_seen_target_is_a_miss():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    assert exact_ranks(scores, torch.tensor([3]), padded(torch.tensor([[1, 1, 1, 0]]), 4)).tolist() == [2]
    assert exact_ranks(scores, torch.tensor([3]), padded(torch.tensor([[1, 3]]), 4)).tolist() == [5]


def test_nan_scores_are_never_better_and_a_nan_target_is_last():
    nan = float("nan")
    scores = torch.tensor([[nan, 1.0, 2.0, nan], [nan, 1.0, 2.0, nan], [nan, nan, nan, nan]])
    targets = torch.tensor([2, 1, 1])
    assert exact_ranks(scores, targets).tolist() == [2, 4, 4]
    assert exact_ranks(scores, targets, padded(torch.tensor([[3, 4], [3, 2], [4, 0]]), 4)).tolist() == [
        1,
        2,
        3,
    ]


def test_infinite_scores_are_ordinary_scores():
    inf = float("inf")
    scores = torch.tensor([[inf, inf, -inf, -inf, 0.0]]).repeat(3, 1)
    assert exact_ranks(scores, torch.tensor([2, 4, 5])).tolist() == [2, 5, 3]


def test_a_target_outside_the_catalogue_is_a_miss():
    assert exact_ranks(torch.rand(2, 5), torch.tensor([0, 6])).tolist() == [6, 6]


def test_ranks_do_not_depend_on_the_chunks_of_users():
    scores, targets, seen = random_case(5)
    parts = [exact_ranks(scores[i : i + 7], targets[i : i + 7], padded(seen[i : i + 7])) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), exact_ranks(scores, targets, padded(seen)))


def test_jagged_seen_items_equal_padded_ones():
    scores, targets, seen = random_case(7)
    rows, columns = (seen > 0).nonzero(as_tuple=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    jagged = SeenItems.of(rows[order], seen[rows, columns][order], 60)
    assert torch.equal(exact_ranks(scores, targets, jagged), exact_ranks(scores, targets, padded(seen)))
    part = jagged.rows_between(11, 23)
    assert torch.equal(part.ids, padded(seen[11:23]).ids) and torch.equal(part.rows, padded(seen[11:23]).rows)
    wanted = torch.stack([targets, seen[:, 0], torch.full_like(targets, 61)], dim=1)
    expected = [[int(i) in set(row.tolist()) - {0} for i in each] for each, row in zip(wanted, seen)]
    assert jagged.contains(wanted).tolist() == expected


def test_no_rows():
    assert exact_ranks(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).tolist() == []
