"""Differential attention by one product with the values against two attentions."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.differential import (
    differential_attention,
    differential_attention_reference,
)
from generative_recommenders.ops.layout import AttentionMask, jagged_layout, padded_layout

LENGTHS = torch.tensor([5, 0, 1, 9, 3])


@pytest.mark.parametrize("heads", [1, 2])
def test_no_tokens(heads: int) -> None:
    """A process that gets no row of the last batch goes on."""
    inputs = [torch.zeros(0, heads, width, requires_grad=True) for width in (6, 6, 5)]
    out = differential_attention(*inputs, torch.rand(heads), jagged_layout(torch.tensor([0, 0]), 9))
    out.sum().backward()
    assert out.shape == inputs[2].grad.shape == (0, heads, 5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["causal", "masked", "padded"])
def test_equals_the_reference(heads: int, rate: float, kind: str) -> None:
    """Values and the gradients of all inputs, under dropout masks from one seed."""
    layout = padded_layout(LENGTHS, 9) if kind == "padded" else jagged_layout(LENGTHS, 9)
    if kind == "masked":  # the first token of each row sees nothing
        places = layout.positions
        layout = layout.with_attention_mask(AttentionMask(places, places - 1))
    torch.manual_seed(0)
    shapes = (heads, 6), (heads, 6), (heads, 5)
    inputs = [torch.randn(layout.num_tokens, *shape, dtype=torch.float64) for shape in shapes]
    inputs.append(torch.rand(heads, dtype=torch.float64))
    grad = layout.mask(torch.randn(layout.num_tokens, heads, 5, dtype=torch.float64))
    results = []
    for attend in (differential_attention, differential_attention_reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(1)
        out = layout.mask(attend(*leaves, layout, rate))
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected)
    if rate == 0.0:
        with dispatch.references():
            plain = layout.mask(differential_attention(*inputs, layout))
        torch.testing.assert_close(plain, results[0][0])
