from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from generative_recommenders.features import UserError
from generative_recommenders.modeling.feed_forward import PointWiseFeedForward, SwiGLU, SwiGLUEncoder
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


def test_unknown_activation_is_named() -> None:
    with pytest.raises(UserError, match="swish.*gelu.*relu"):
        PointWiseFeedForward(4, 0.0, "swish")
