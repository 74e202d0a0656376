"""Feed-forward layers against golden numbers and their equations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from comparison import assert_same, fast_and_reference
from generative_recommenders.ops.dropout import KeepMasks
from generative_recommenders.ops.feed_forward import SwiGLU, SwiGLUEncoder, feed_forward, swiglu_reference
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters

BUILDERS = {
    "replay_swiglu": lambda c: SwiGLU(c["D"], c["hidden"]),
    "replay_swiglu_encoder": lambda c: SwiGLUEncoder(c["D"], c["hidden"]),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_parity(case: str) -> None:
    golden = load_golden(case)
    module = BUILDERS[case](golden.config)
    load_parameters(module, golden.parameters)
    x = golden.inputs["x"].requires_grad_()
    out = module(x)
    assert_near(out, golden.outputs["out"])
    assert_gradients(golden, out, module=module, x=x)


@pytest.mark.parametrize("module", [SwiGLU(6, 4), SwiGLUEncoder(6, 12)])
def test_tokens_and_rectangles_agree(module: torch.nn.Module) -> None:
    rectangle = torch.randn(3, 5, 6)
    assert torch.allclose(module(rectangle).flatten(0, 1), module(rectangle.flatten(0, 1)), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (0, 5)])
def test_swiglu_equals_the_reference(bias: bool, shape: tuple[int, ...]) -> None:
    module = SwiGLU(5, 7, bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    reference = swiglu_reference(x, module.WG, module.W1, module.W2, module.dropout)
    assert_same(module(x), reference, [x, *module.parameters()])


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (0, 5)])
def test_relu_with_dropout_is_its_equation(shape: tuple[int, ...]) -> None:
    """Values and gradients of the function written out by hand and of its reference, under masks from one seed."""
    rate, dtype = 0.4, torch.float64
    layers = torch.nn.Linear(5, 7, dtype=dtype), torch.nn.Linear(7, 5, dtype=dtype)
    for layer in layers:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    outputs = fast_and_reference(lambda: feed_forward(x, *layers, F.relu, rate))
    torch.manual_seed(7)
    masks = KeepMasks(rate, x, 12 * x[..., 0].numel())
    inner, outer = (masks.draw((*shape[:-1], width)) / (1 - rate) for width in (7, 5))
    expected = x + outer * layers[1](inner * torch.relu(layers[0](x)))
    if x.numel():
        assert (outer == 0).any() and (inner == 0).any()
    for out in outputs:
        assert_same(out, expected, [x, *layers[0].parameters(), *layers[1].parameters()])
