"""Masked sums of exponentials against plain torch: values and gradients."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp, masked_logsumexp_reference


@pytest.mark.parametrize("shape", [(6, 5), (4, 1)])
def test_rows_without_and_with_false_entries(shape: tuple[int, int]) -> None:
    x = (5 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(shape) < 0.5
    mask[0], mask[1] = True, False
    assert_same(masked_logsumexp(x, mask), masked_logsumexp_reference(x, mask), [x])
