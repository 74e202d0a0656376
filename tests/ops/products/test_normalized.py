"""Products with normalised rows against plain torch."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.ops.products.normalized import (
    normalized_products,
    normalized_products_reference,
)


@pytest.mark.parametrize("shape", [(3, 5, 2, 4), (1, 0, 2, 4), (2, 5, 0, 4)])
def test_products_and_gradients_equal_the_reference(shape: tuple[int, ...]) -> None:
    batch, num_items, num_queries, width = shape
    queries = torch.randn(batch, num_queries, width, dtype=torch.float64)
    items = torch.randn(batch, num_items, width, dtype=torch.float64)
    items[:, :1] *= 1e-4  # a norm below eps: divided by eps, and no gradient goes through the norm
    items[:, 1:2] = 0
    grad, results = torch.randn(batch, num_items, num_queries, dtype=torch.float64), []
    for products in (normalized_products, normalized_products_reference):
        leaves = [each.clone().requires_grad_() for each in (queries, items)]
        out = products(*leaves, 1e-2)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected)
