"""RePlay's SASRec layer against golden numbers, with padding, gradients and dtypes."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.mask import DefaultAttentionMask, additive_mask, causal_mask
from generative_recommenders.compat.replay.nn.sequential import SasRecTransformerLayer
from generative_recommenders.errors import UserError
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters


def _layer_of(golden) -> SasRecTransformerLayer:
    c = golden.config
    layer = SasRecTransformerLayer(c["D"], c["heads"], c["num_blocks"], 0.0, c["activation"], c["hidden"])
    load_parameters(layer, golden.parameters)
    return layer


def test_parity_in_evaluation() -> None:
    golden = load_golden("replay_sasrec_layer")
    layer = _layer_of(golden).eval()
    x, real = golden.inputs["x"].requires_grad_(), golden.inputs["padding_mask"]
    out = layer({}, x, real, golden.inputs["attention_mask"])
    assert torch.isfinite(out).all()
    assert_near(out[real], golden.outputs["out"][real])
    assert_gradients(golden, out, module=layer, x=x)


def test_parity_in_training() -> None:
    golden = load_golden("replay_sasrec_layer")
    layer = _layer_of(golden).train()
    x, real = golden.inputs["x"], golden.inputs["padding_mask"]
    mask = DefaultAttentionMask("item_id", golden.config["heads"]).train()({"item_id": real}, real)
    out = layer({}, x, real, mask)
    assert torch.isfinite(out).all()
    assert_near(out[real], golden.outputs["out_train"][real])


def test_padded_keys_are_hidden_even_from_a_plain_causal_mask() -> None:
    layer = SasRecTransformerLayer(8, 2, 2, 0.0).eval()
    real = torch.tensor([[False, False, True, True]])
    x = torch.randn(1, 4, 8)
    changed = x.clone()
    changed[:, :2] += 1.0
    causal = additive_mask(causal_mask(4)).expand(1, 2, 4, 4)
    assert torch.allclose(layer({}, x, real, causal)[:, 2:], layer({}, changed, real, causal)[:, 2:], atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_stay_finite_with_a_row_without_events(training: bool) -> None:
    layer = SasRecTransformerLayer(8, 2, 2, 0.0).train(training)
    real = torch.tensor([[False, False, False], [False, True, True]])
    mask = DefaultAttentionMask("a", 2).train(training)({"a": real}, real)
    x = torch.randn(2, 3, 8, requires_grad=True)
    layer({}, x, real, mask).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes_agree_at_real_positions(dtype: torch.dtype, training: bool) -> None:
    layer = SasRecTransformerLayer(8, 2, 2, 0.0).train(training)
    real = torch.tensor([[False, False, False, True], [True, True, True, True]])
    mask = DefaultAttentionMask("a", 2).train(training)({"a": real}, real)
    x = torch.randn(2, 4, 8)
    expected = layer({}, x, real, mask)[real]
    out = layer.to(dtype)({}, x.to(dtype), real, mask)
    assert out.dtype == dtype and torch.isfinite(out).all()
    tolerance = 1e-5 if dtype == torch.float64 else 0.2
    assert (out[real].float() - expected).abs().max() < tolerance


def test_head_count_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="not divisible"):
        SasRecTransformerLayer(8, 3, 1, 0.0)
