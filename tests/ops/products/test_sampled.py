"""Products with sampled rows against gathered rows: values and gradients."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops.products import sampled as module
from generative_recommenders.ops.products.sampled import (
    block_products,
    block_products_reference,
    join_blocks,
    many_rows,
    sampled_products,
    sampled_products_reference,
    scored_products,
    scored_products_reference,
    split_blocks,
)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck() -> None:
    rows = torch.randint(0, 13, (21, 3))
    assert torch.autograd.gradcheck(lambda h, w: sampled_products(h, w, rows), (leaf(21, 4), leaf(13, 4)))


@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize("draws", [4, 5, 40])
@pytest.mark.parametrize("size", [1, 40, 10**6])
def test_sampled_products(draws: int, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pattern is sorted in parts, and where more rows are drawn than there are."""
    monkeypatch.setattr(module, "PART_ENTRIES", size)
    leaves = leaf(tokens, 4), leaf(13, 4)
    rows = torch.randint(13, (tokens, draws))
    assert_same(sampled_products(*leaves, rows), sampled_products_reference(*leaves, rows), leaves)


def test_a_row_index_beyond_16_bits() -> None:
    leaves = leaf(3, 2), leaf(40_000, 2)
    rows = torch.tensor([[39_999, 1], [33_000, 1], [0, 32_768]])
    assert_same(sampled_products(*leaves, rows), sampled_products_reference(*leaves, rows), leaves)


@pytest.mark.parametrize("eps", [None, 1e-6, 1.5])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_scored_products(tokens: int, eps: float | None) -> None:
    """Also with norms below the least one that is divided by, rows of zeros among them."""
    leaves = leaf(tokens, 3), torch.cat([torch.zeros(1, 3), torch.randn(39, 3)]).double().requires_grad_()
    rows = torch.randint(40, (tokens, 2)), torch.randint(40, (tokens, 5))
    fast, plain = scored_products(*leaves, *rows, eps), scored_products_reference(*leaves, *rows, eps)
    for positive_share in (0.0, 0.5, 1.0):
        sums = (pair[0].square().sum() * positive_share + pair[1].square().sum() for pair in (fast, plain))
        grads = [torch.autograd.grad(each, leaves, retain_graph=True) for each in sums]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(fast, plain)


def test_rows_are_many_where_a_sample_reads_each_a_few_times() -> None:
    drawn = torch.zeros(10, 20, dtype=torch.int64)
    assert many_rows(torch.zeros(26, 2), drawn)
    assert not many_rows(torch.zeros(25, 2), drawn)  # each is read eight times
    assert not many_rows(torch.zeros(20, 2), drawn[:1])  # all products are no more


@pytest.mark.parametrize("tokens", [1, 5, 16, 21])
@pytest.mark.parametrize("lead", [0, 3, 7])
@pytest.mark.parametrize("size", [8, 100])
def test_block_products(tokens: int, lead: int, size: int) -> None:
    blocks = -(-(lead + tokens) // size)
    leaves = leaf(tokens, 4), leaf(blocks, 5, 4)
    actual, expected = block_products(*leaves, size, lead), block_products_reference(*leaves, size, lead)
    assert_same(actual, expected, leaves)
    split = split_blocks(leaves[0], blocks, size, lead)
    assert torch.equal(join_blocks(split, tokens, lead), leaves[0])
