"""RePlay's differential attention, block and layer against golden numbers and their equations."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.attention import MultiHeadDifferentialAttention
from generative_recommenders.compat.replay.nn.mask import additive_mask, causal_mask
from generative_recommenders.compat.replay.nn.sequential import DiffTransformerBlock, DiffTransformerLayer
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.diff_transformer import lambda_init_of_block
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.layout import jagged_layout
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters


def _causal(batch: int, heads: int, length: int) -> torch.Tensor:
    return additive_mask(causal_mask(length)).expand(batch * heads, length, length)


def test_attention_parity() -> None:
    golden = load_golden("replay_diff_attention")
    c = golden.config
    module = MultiHeadDifferentialAttention(
        c["D"], c["heads"], c["lambda_init"], c["bias"], kdim=c["kdim"], vdim=c["vdim"]
    )
    load_parameters(module, golden.parameters)
    inputs = {name: golden.inputs[name].requires_grad_() for name in ("query", "key", "value")}
    out = module(**inputs, attn_mask=golden.inputs["attention_mask"])
    assert_near(out, golden.outputs["out"])
    assert_gradients(golden, out, module=module, **inputs)


@pytest.mark.parametrize("case", ["replay_diff_block", "replay_diff_layer"])
def test_block_and_layer_parity(case: str) -> None:
    golden = load_golden(case)
    c = golden.config
    if "num_blocks" in c:
        module = DiffTransformerLayer(c["D"], c["heads"], c["num_blocks"])
    else:
        module = DiffTransformerBlock(c["D"], c["heads"], c["lambda_init"])
    load_parameters(module, golden.parameters)
    x = golden.inputs["x"].requires_grad_()
    out = module(x, golden.inputs["attention_mask"])
    assert_near(out, golden.outputs["out"])
    assert_gradients(golden, out, module=module, x=x)


@pytest.mark.parametrize(("kdim", "vdim", "bias"), [(None, None, False), (4, 12, True), (12, 4, False)])
def test_attention_is_its_equation(kdim: int | None, vdim: int | None, bias: bool) -> None:
    heads, width, length = 2, 8, 4
    module = MultiHeadDifferentialAttention(width, heads, 0.3, bias, kdim=kdim, vdim=vdim)
    x = torch.randn(1, length, width)
    dq, dv = (kdim or width) // heads, (vdim or width) // heads
    q, k, v = module.W_q(x)[0], module.W_k(x)[0], module.W_v(x)[0]
    outputs = []
    for h in range(heads):
        a = []
        for half in (0, 1):
            columns = slice(h * 2 * dq + half * dq, h * 2 * dq + (half + 1) * dq)
            scores = q[:, columns] @ k[:, columns].T / dq**0.5
            a.append(torch.softmax(scores.masked_fill(~causal_mask(length), -torch.inf), -1))
        lam = (module.lambda_q1[h] @ module.lambda_k1[h]).exp()
        lam = lam - (module.lambda_q2[h] @ module.lambda_k2[h]).exp() + 0.3
        o = (a[0] - lam * a[1]) @ v[:, h * dv : (h + 1) * dv]
        outputs.append(o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * module.rms_scale * 0.7)
    assert_near(module(x, x, x)[0], module.W_o(torch.cat(outputs, -1)))


def test_both_mask_shapes_agree_with_the_causal_default() -> None:
    module = MultiHeadDifferentialAttention(8, 2, 0.2)
    x = torch.randn(3, 5, 8)
    flat = _causal(3, 2, 5)
    assert torch.allclose(module(x, x, x), module(x, x, x, flat), atol=1e-6)
    assert torch.allclose(module(x, x, x), module(x, x, x, flat.view(3, 2, 5, 5)), atol=1e-6)
    with pytest.raises(UserError, match="equal lengths"):
        module(x, x[:, :4], x[:, :4])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_is_causal(norm: str) -> None:
    layer = DiffTransformerLayer(8, 2, 2, norm=norm)
    x = torch.randn(2, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1.0
    assert torch.allclose(layer(x)[:, :4], layer(changed)[:, :4], atol=1e-6)
    assert not torch.allclose(layer(x)[:, 4:], layer(changed)[:, 4:], atol=1e-3)


def test_pre_norm_is_the_papers_block() -> None:
    block = DiffTransformerBlock(8, 2, 0.2, norm="pre")
    x = torch.randn(2, 5, 8)
    normed = block.attn_norm(x)
    y = block.attn(normed, normed, normed) + x
    assert torch.allclose(block(x), block.ff(block.ff_norm(y)) + y, atol=1e-6)


def test_project_and_combine_carry_jagged_tokens() -> None:
    module = MultiHeadDifferentialAttention(8, 2, 0.2, vdim=16)
    lengths = torch.tensor([5, 0, 2])
    layout = jagged_layout(lengths, 5)
    x = torch.randn(3, 5, 8)
    q, k, v = module.project(*[layout.flatten(x)] * 3)
    halves = zip(q.chunk(2, -1), k.chunk(2, -1))
    first, second = (softmax_attention(*half, v, layout) for half in halves)
    assert torch.allclose(module.combine(first, second), layout.flatten(module(x, x, x)), atol=1e-6)


def test_lambda_init_follows_the_block() -> None:
    assert lambda_init_of_block(0) == pytest.approx(0.2)
    layer = DiffTransformerLayer(8, 2, 3)
    assert [block.attn.lambda_init for block in layer.layers] == pytest.approx([0.2, 0.35550907, 0.47071302])


def test_bad_sizes_and_norms_are_refused() -> None:
    with pytest.raises(UserError, match="vdim 9"):
        MultiHeadDifferentialAttention(8, 2, 0.2, vdim=9)
    with pytest.raises(UserError, match="middle"):
        DiffTransformerBlock(8, 2, 0.2, norm="middle")
