"""The postprocessors against their equations; the L2 norm beside torch's own, vectors too short for it included."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.modeling.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
    LayerNormEmbeddingPostprocessor,
    NoPostprocessor,
)
from generative_recommenders.ops.normalization import l2_normalize


def test_postprocessors_are_their_equations() -> None:
    x, l2, layer = 5 * torch.randn(4, 3, 8), L2NormEmbeddingPostprocessor(), LayerNormEmbeddingPostprocessor()
    torch.testing.assert_close(l2(x), x / x.norm(dim=-1, keepdim=True))
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert all((each(torch.zeros(2, 8)) == 0).all() for each in (l2, layer))


def test_options_of_none_are_refused() -> None:
    with pytest.raises(TypeError):
        NoPostprocessor(3, foo=1)  # type: ignore[call-arg]


def test_l2_normalize_is_torchs() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    x[1] *= 1e-9
    x[2] = 0.0
    grad, results = torch.randn_like(x), []
    for normalize in (l2_normalize, lambda v, eps: torch.nn.functional.normalize(v, dim=-1, eps=eps)):
        leaf = x.clone().requires_grad_()
        y = normalize(leaf, 1e-6)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(lambda v: l2_normalize(v, 1e-6), (x[3:].clone().requires_grad_(),))
