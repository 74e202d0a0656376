"""Norms against plain torch: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from comparison import assert_same
from generative_recommenders.ops.normalization import (
    column_sums,
    l2_normalize,
    l2_normalize_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)

Norm = Callable[[torch.Tensor, float], torch.Tensor]


@pytest.mark.parametrize(
    ("norm", "reference"), [(l2_normalize, l2_normalize_reference), (layer_norm, layer_norm_reference)]
)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 8), (0, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_norms_without_weights(norm: Norm, reference: Norm, shape: tuple[int, ...], scale: float) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
    assert_same(norm(x, 1e-6), reference(x, 1e-6), [x])


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 5), (0, 5)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (5,)))
    assert_same(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), [x, weight])


def test_sums_of_columns() -> None:
    for rows in (0, 5, 8, 19):
        x = torch.randn(rows, 3, dtype=torch.float64)
        torch.testing.assert_close(column_sums(x), x.sum(0))
