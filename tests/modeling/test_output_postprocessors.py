"""The L2 norm beside torch's own, gradients and vectors too short to be normalised included."""

from __future__ import annotations

import torch

from generative_recommenders.ops.normalization import l2_normalize


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
