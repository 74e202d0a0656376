"""The kernels of a GPU against gathered rows, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from generative_recommenders.ops.embedding import bags_of_rows
from generative_recommenders.ops.products import kernels
from generative_recommenders.ops.products.sampled import sampled_products_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize(("draws", "width"), [(3, 1), (32, 16), (70, 50)])
def test_products_and_their_gradients(tokens: int, draws: int, width: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    weight = torch.randn(90, width, device=DEVICE, requires_grad=True)
    rows = torch.randint(90, (tokens, draws), device=DEVICE)
    expected = sampled_products_reference(hidden, weight, rows)
    grad = torch.randn_like(expected)
    by_hidden, by_weight = torch.autograd.grad(expected, (hidden, weight), grad)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(kernels.products(hidden.detach(), weight.detach(), rows), expected, **close)
    torch.testing.assert_close(kernels.sums_of_rows(weight.detach(), rows, grad), by_hidden, **close)
    bags = bags_of_rows(rows.flatten(), len(weight))
    torch.testing.assert_close(kernels.sums_of_tokens(hidden.detach(), grad, *bags), by_weight, **close)
