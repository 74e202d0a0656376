"""Ranks counted block by block against the ranks of all scores."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.evaluation import product_ranks as module
from generative_recommenders.evaluation.product_ranks import product_ranks, product_ranks_reference
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems

SPECIAL = (float("nan"), float("inf"), float("-inf"))


def whole_numbers(seed: int, users: int, items: int, levels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and items whose products are small integers, exact in any order, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randint(-levels, levels + 1, (n, 3), generator=generator).float() for n in (users, items)
    )


def some_ids(seed: int, items: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, items + 2, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(("users", "items"), [(1, 1), (5, 7), (30, 40), (70, 41), (0, 9), (3, 0)])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, users: int, items: int, filtered: bool) -> None:
    monkeypatch.setattr(module, "USERS", 32)
    monkeypatch.setattr(module, "ITEMS", 8)
    for seed in range(5):
        queries, table = whole_numbers(seed, users, items)
        targets = some_ids(seed, items, users)
        seen = SeenItems.padded(some_ids(seed + 50, items, users, 6), items) if filtered else None
        expected = product_ranks_reference(queries, table, targets, seen)
        assert torch.equal(product_ranks(queries, table, targets, seen), expected)


def test_rounded_scores_are_ranked_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many scores are the same in bfloat16: among those the smaller id goes first."""
    monkeypatch.setattr(module, "ITEMS", 64)
    generator = torch.Generator().manual_seed(0)
    queries, table = (torch.rand(n, 3, generator=generator) for n in (40, 700))
    targets, seen = some_ids(1, 700, 40), SeenItems.padded(some_ids(2, 700, 40, 30), 700)
    scores = (queries @ table.T).bfloat16().float()
    expected = exact_ranks(scores, targets, seen)
    assert (expected != exact_ranks(queries @ table.T, targets, seen)).any()
    for ranks in (product_ranks, product_ranks_reference):
        assert torch.equal(ranks(queries, table, targets, seen, dtype=torch.bfloat16), expected)


def test_blocks_of_the_real_size() -> None:
    queries, table = whole_numbers(0, 600, 5000)
    targets, seen = some_ids(1, 5000, 600), SeenItems.padded(some_ids(2, 5000, 600, 30), 5000)
    expected = exact_ranks(queries @ table.T, targets, seen)
    assert torch.equal(product_ranks(queries, table, targets, seen), expected)


@pytest.mark.parametrize("value", SPECIAL)
def test_scores_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(module, "ITEMS", 8)
    queries, table = torch.ones(40, 1), torch.arange(40.0)[:, None] // 3
    table[[3, 11, 12, 30]] = value
    queries[20:] = 0.5
    queries[30:] = value
    seen = SeenItems.padded(some_ids(2, 40, 40, 5), 40)
    for targets in (torch.arange(1, 41), torch.arange(1, 41).flip(0)):
        expected = product_ranks_reference(queries, table, targets, seen)
        assert torch.equal(product_ranks(queries, table, targets, seen), expected)


def test_zeros_of_both_signs_and_the_smallest_numbers_are_told_apart_as_they_compare() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    table = torch.tensor([[0.0], [-0.0], [tiny], [-tiny], [0.0], [tiny / 4], [-tiny / 4]])
    targets = torch.arange(1, 8)
    expected = exact_ranks(table.T.repeat(7, 1), targets)
    assert torch.equal(product_ranks(torch.ones(7, 1), table, targets), expected)


def test_a_rank_does_not_depend_on_who_is_ranked_beside() -> None:
    generator = torch.Generator().manual_seed(3)
    queries, table = (torch.randn(n, 50, generator=generator) for n in (300, 3000))
    targets = some_ids(4, 3000, 300)
    together = product_ranks(queries, table, targets)
    parts = [product_ranks(q, table, t) for q, t in zip(queries.split(37), targets.split(37))]
    assert torch.equal(together, torch.cat(parts))


def test_targets_are_compared_by_the_scores_of_their_own_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._BlockOfUsers, "target_scores", lambda self: torch.full((self.count,), 0.1))
    queries, table = whole_numbers(1, 20, 50)
    targets = some_ids(5, 50, 20).clamp(1, 50)
    assert torch.equal(product_ranks(queries, table, targets), exact_ranks(queries @ table.T, targets))


def test_threads_count_what_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITEMS", 8)
    queries, table = whole_numbers(0, 70, 101)
    targets, seen = some_ids(1, 101, 70), SeenItems.padded(some_ids(2, 101, 70, 9), 101)
    expected, before = product_ranks_reference(queries, table, targets, seen), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(product_ranks(queries, table, targets, seen), expected)
    finally:
        torch.set_num_threads(before)
