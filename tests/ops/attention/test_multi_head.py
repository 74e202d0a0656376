"""Multi-head attention: one head over the inputs themselves against its reference, torch's module, and the choice."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same, fast_and_reference
from generative_recommenders.ops.attention.multi_head import multi_head_attention
from generative_recommenders.ops.layout import jagged_layout


def projections(width: int) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    in_proj, out_proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
    for linear in (in_proj, out_proj):
        torch.nn.init.normal_(linear.bias)
    return in_proj, out_proj


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("width", [5, 8])
def test_one_head_equals_its_reference_with_gradients_and_one_dropout_mask(width: int, rate: float) -> None:
    layout, (in_proj, out_proj) = jagged_layout(torch.tensor([3, 0, 5]), 5), projections(width)
    query, x = (torch.randn(8, width, requires_grad=True) for _ in range(2))
    outputs = fast_and_reference(lambda: multi_head_attention(query, x, in_proj, out_proj, 1, layout, rate))
    torch.testing.assert_close(*outputs)
    assert_same(*outputs, [query, x, *in_proj.parameters(), *out_proj.parameters()], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 2])
def test_equals_torchs_module(heads: int) -> None:
    module = torch.nn.MultiheadAttention(8, heads, batch_first=True)
    in_proj, out_proj = projections(8)
    with torch.no_grad():
        module.in_proj_weight.copy_(in_proj.weight)
        module.in_proj_bias.copy_(in_proj.bias)
        module.out_proj.load_state_dict(out_proj.state_dict())
    layout, query, x = jagged_layout(torch.tensor([4]), 4), torch.randn(4, 8), torch.randn(4, 8)
    expected, _ = module(query[None], x[None], x[None], attn_mask=torch.ones(4, 4).triu(1).bool())
    for out in fast_and_reference(lambda: multi_head_attention(query, x, in_proj, out_proj, heads, layout)):
        torch.testing.assert_close(out, expected[0])
