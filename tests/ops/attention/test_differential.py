"""Differential attention by one product with the values against two attentions."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same, fast_and_reference
from generative_recommenders.ops.attention.differential import differential_attention, differential_self_attention
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
    shapes = (layout.num_tokens, heads, 6), (layout.num_tokens, heads, 6), (layout.num_tokens, heads, 5), (heads,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    outputs = fast_and_reference(lambda: layout.mask(differential_attention(*inputs, layout, rate)))
    assert_same(*outputs, inputs)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_self_attention_equals_the_reference(heads: int, rate: float, kind: str) -> None:
    """One head attends to the inputs as keys and values, other numbers of heads to their projections."""
    layout = jagged_layout(LENGTHS, 9)
    if kind == "masked":
        layout = layout.with_attention_mask(AttentionMask(layout.positions, layout.positions - 1))
    torch.manual_seed(0)
    shapes = (layout.num_tokens, 6), (heads * 8, 6), (heads * 8, 6), (heads * 5, 6), (heads,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert_same(*fast_and_reference(lambda: differential_self_attention(*inputs, layout, rate)), inputs)
