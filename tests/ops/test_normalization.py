"""Norms and gated layers that are written out against plain torch."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.ops.feed_forward import SwiGLU, swiglu_reference
from generative_recommenders.ops.normalization import column_sums, rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 5), (0, 5)])
def test_rms_norm_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight, grad = (torch.randn(size, dtype=torch.float64) for size in (shape, (5,), shape))
    results = []
    for norm in (rms_norm, rms_norm_reference):
        leaves = [each.clone().requires_grad_() for each in (x, weight)]
        out = norm(*leaves, 1e-5)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (0, 5)])
def test_swiglu_equals_the_reference(bias: bool, shape: tuple[int, ...]) -> None:
    module, results = SwiGLU(5, 7, bias).double(), []
    x, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    for plain in (False, True):
        leaf = x.clone().requires_grad_()
        layers = module.WG, module.W1, module.W2, module.dropout
        out = swiglu_reference(leaf, *layers) if plain else module(leaf)
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], grad)])
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected)


def test_sums_of_columns() -> None:
    for rows in (0, 5, 8, 19):
        x = torch.randn(rows, 3, dtype=torch.float64)
        torch.testing.assert_close(column_sums(x), x.sum(0))
