"""Dot-product similarity: golden shapes, shared items, and rows of a table."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from golden_parity import read_golden


@pytest.mark.parametrize(
    "queries, items, expected",
    [
        ("query", "items_shared", "shared"),
        ("query", "items_batched", "batched"),
        ("query_repeated", "items_batched", "repeated"),
    ],
)
def test_golden_shapes(queries, items, expected):
    arrays, meta = read_golden("meta_dot_product")
    scores, losses = DotProductSimilarity()(arrays[f"input/{queries}"], arrays[f"input/{items}"])
    assert scores.shape[1] == meta["config"]["X"]
    torch.testing.assert_close(scores, arrays[f"output/{expected}"], atol=1e-5, rtol=1e-5)
    assert losses == {}


def test_shared_items_without_a_leading_axis():
    arrays, _ = read_golden("meta_dot_product")
    scores, _ = DotProductSimilarity().score(arrays["input/query"], arrays["input/items_shared"][0])
    torch.testing.assert_close(scores, arrays["output/shared"], atol=1e-5, rtol=1e-5)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="5 queries"):
        DotProductSimilarity().score(torch.rand(5, 2), torch.rand(2, 3, 2))


def test_rows_of_a_table():
    queries, items, rows = torch.randn(4, 3), torch.randn(6, 3), torch.randint(0, 6, (4, 5))
    scores, _ = DotProductSimilarity().score_rows(queries, items, rows)
    torch.testing.assert_close(scores, (queries @ items.T).gather(1, rows))
    single, _ = DotProductSimilarity().score_rows(queries[:1], items, rows[:1])
    torch.testing.assert_close(single, scores[:1])
    shared = [(slice(0, 1), torch.tensor([5, 0])), (slice(1, 4), torch.tensor([2, 2]))]
    of_shared = DotProductSimilarity().score_negatives(queries, items, shared)
    expected = (queries @ items.T).gather(1, torch.tensor([[5, 0], [2, 2], [2, 2], [2, 2]]))
    torch.testing.assert_close(of_shared, expected)
    torch.testing.assert_close(DotProductSimilarity().score_negatives(queries, items, rows), scores)
