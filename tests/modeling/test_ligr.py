"""LiGR against its equations, with torch's own attention, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from generative_recommenders.modeling.encoders.ligr import LiGR, LigrBlock
from generative_recommenders.ops.layout import jagged_layout

FORMS = [
    {},
    {"ffn_activation_fn": "gelu"},
    {"ffn_activation_fn": "relu", "ffn_bias": True},
    {"ffn_multiply": 1, "ffn_bias": True},
]


def block_by_hand(block: LigrBlock, x: torch.Tensor) -> torch.Tensor:
    """One sequence ``x [n, D]`` through torch's module of attention."""
    attention = torch.nn.MultiheadAttention(x.shape[1], block.num_heads)
    names = {"in_proj_weight": block.in_proj.weight, "in_proj_bias": block.in_proj.bias}
    names |= {f"out_proj.{name}": value for name, value in block.out_proj.named_parameters()}
    attention.load_state_dict(names)
    future = torch.ones(len(x), len(x)).triu(1).bool()
    normed = block.attn_norm(x)
    y = x + torch.sigmoid(block.attn_gate(x)) * attention(normed, normed, normed, attn_mask=future)[0]
    return y + torch.sigmoid(block.ffn_gate(y)) * block.ffn(block.ffn_norm(y))


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("num_heads", [1, 2])
@torch.no_grad()
def test_its_equations(num_heads: int, options: dict) -> None:
    torch.manual_seed(0)
    encoder, lengths = LiGR(8, 2, num_heads, **options).eval(), [7, 1, 0, 4]
    for parameter in encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x = torch.randn(sum(lengths), 8)
    actual = encoder(x, jagged_layout(torch.tensor(lengths), 9), {})
    for own, out in zip(x.split(lengths), actual.split(lengths)):
        expected = own
        for block in encoder.blocks if len(own) else ():
            expected = block_by_hand(block, expected)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_swiglu_has_no_bias_unless_asked_for() -> None:
    x = torch.randn(3, 8)
    feed_forward = LiGR(8).eval().blocks[0].ffn
    expected = (F.silu(x @ feed_forward.WG.weight.T) * (x @ feed_forward.W1.weight.T)) @ feed_forward.W2.weight.T
    torch.testing.assert_close(feed_forward(x), expected)
