"""Feed-forward layers against golden numbers and their equations."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.dropout import KeepMasks
from generative_recommenders.ops.feed_forward import PointWiseFeedForward, SwiGLU, SwiGLUEncoder
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters

BUILDERS = {
    "replay_swiglu": lambda c: SwiGLU(c["D"], c["hidden"]),
    "replay_swiglu_encoder": lambda c: SwiGLUEncoder(c["D"], c["hidden"]),
    "replay_pointwise_ffn": lambda c: PointWiseFeedForward(c["D"], 0.0, c["activation"], c["hidden"]),
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


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_point_wise_is_its_equation(activation: str) -> None:
    module = PointWiseFeedForward(4, 0.5, activation, hidden_dim=3).eval()
    x = torch.randn(5, 4)
    hidden = getattr(torch.nn.functional, activation)(x @ module.linear1.weight.T + module.linear1.bias)
    assert torch.allclose(module(x), x + hidden @ module.linear2.weight.T + module.linear2.bias, atol=1e-6)


@pytest.mark.parametrize("module", [PointWiseFeedForward(6, 0.0), SwiGLU(6, 4), SwiGLUEncoder(6, 12)])
def test_tokens_and_rectangles_agree(module: torch.nn.Module) -> None:
    rectangle = torch.randn(3, 5, 6)
    assert torch.allclose(module(rectangle).flatten(0, 1), module(rectangle.flatten(0, 1)), atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    module = PointWiseFeedForward(16, 0.5)
    x = torch.randn(4, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (0, 5)])
def test_relu_with_dropout_is_its_equation(shape: tuple[int, ...]) -> None:
    """Values and gradients of the function written out by hand and of its reference, under masks from one seed."""
    rate, dtype = 0.4, torch.float64
    module = PointWiseFeedForward(5, rate, "relu", hidden_dim=7).to(dtype)
    for bias in (module.linear1.bias, module.linear2.bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    torch.manual_seed(6)
    out = module(x)
    torch.manual_seed(6)
    masks = KeepMasks(rate, x, 12 * x[..., 0].numel())
    inner, outer = (masks.draw((*shape[:-1], width)) / (1 - rate) for width in (7, 5))
    expected = x + outer * module.linear2(inner * torch.relu(module.linear1(x)))
    torch.testing.assert_close(out, expected)
    torch.manual_seed(6)
    with dispatch.references():
        reference = module(x)
    torch.testing.assert_close(reference, expected)
    if x.numel():
        assert (outer == 0).any() and (inner == 0).any()
    weights = torch.randn(*shape, dtype=dtype)
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad(each, inputs, weights) for each in (expected, out, reference)]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_unknown_activation_is_named() -> None:
    with pytest.raises(UserError, match="swish.*gelu.*relu"):
        PointWiseFeedForward(4, 0.0, "swish")
