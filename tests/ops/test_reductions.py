"""Norms and masked sums of exponentials against plain torch: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from generative_recommenders.ops.normalization import (
    l2_normalize,
    l2_normalize_reference,
    layer_norm,
    layer_norm_reference,
)
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp, masked_logsumexp_reference

Op = Callable[..., torch.Tensor]


def assert_same(fast: Op, reference: Op, x: torch.Tensor, *args: object) -> None:
    values = fast(x, *args), reference(x, *args)
    torch.testing.assert_close(*values)
    cotangent = torch.randn_like(values[0])
    torch.testing.assert_close(*(torch.autograd.grad(each, x, cotangent)[0] for each in values))


@pytest.mark.parametrize("ops", [(l2_normalize, l2_normalize_reference), (layer_norm, layer_norm_reference)])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 8), (0, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_norms(ops: tuple[Op, Op], shape: tuple[int, ...], scale: float) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
    assert_same(*ops, x, 1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (4, 1)])
def test_masked_logsumexp(shape: tuple[int, int]) -> None:
    x = (5 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(shape) < 0.5
    mask[0], mask[1] = True, False
    assert_same(masked_logsumexp, masked_logsumexp_reference, x, mask)
