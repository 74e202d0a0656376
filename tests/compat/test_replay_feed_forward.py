"""RePlay's point-wise feed-forward: recorded numbers, its equation, its arguments."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.ffn import PointWiseFeedForward
from generative_recommenders.errors import UserError
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters


def test_recorded_numbers() -> None:
    golden = load_golden("replay_pointwise_ffn")
    config = golden.config
    module = PointWiseFeedForward(config["D"], 0.0, config["activation"], config["hidden"])
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


def test_dropout_acts_in_training_only() -> None:
    module = PointWiseFeedForward(16, 0.5)
    x = torch.randn(4, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(UserError, match="swish.*relu, gelu"):
        PointWiseFeedForward(4, 0.0, "swish")
