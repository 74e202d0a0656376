"""Products with normalised rows against plain torch."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops.products.normalized import (
    normalized_products,
    normalized_products_reference,
)


@pytest.mark.parametrize("shape", [(3, 5, 2, 4), (1, 0, 2, 4), (2, 5, 0, 4)])
def test_products_and_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    batch, num_items, num_queries, width = shape
    queries = torch.randn(batch, num_queries, width, dtype=torch.float64, requires_grad=True)
    items = torch.randn(batch, num_items, width, dtype=torch.float64)
    items[:, :1] *= 1e-4  # a norm below eps: divided by eps, and no gradient goes through the norm
    items[:, 1:2] = 0
    items.requires_grad_()
    ways = normalized_products, normalized_products_reference
    assert_same(*(way(queries, items, 1e-2) for way in ways), [queries, items])
