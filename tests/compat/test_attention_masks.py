"""RePlay's attention masks: shapes, golden values, and finite results for hidden rows."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.mask import (
    DefaultAttentionMask,
    additive_mask,
    causal_mask,
    hide_padded_keys,
    mask_for,
    mask_per_head,
)
from generative_recommenders.errors import UserError
from golden_parity import load_golden


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_default_mask_parity(mode: str) -> None:
    golden = load_golden("replay_default_attention_mask")
    padding_mask = golden.inputs["padding_mask"]
    mask = DefaultAttentionMask("item_id", golden.config["heads"]).train(mode == "train")
    out = mask({"item_id": torch.zeros(padding_mask.shape, dtype=torch.int64)}, padding_mask)
    assert out.dtype == torch.float32
    assert torch.equal(out, golden.outputs[mode])


def test_default_mask_of_a_row_without_events_keeps_the_diagonal() -> None:
    mask = DefaultAttentionMask("a", 1)({"a": torch.zeros(1, 3)}, torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(mask[0] == 0, torch.eye(3, dtype=torch.bool))


def test_default_mask_names_the_missing_feature() -> None:
    with pytest.raises(UserError, match="item_id"):
        DefaultAttentionMask("item_id", 1)({"x": torch.zeros(1, 3)}, torch.ones(1, 3, dtype=torch.bool))


def test_mask_per_head_takes_both_documented_shapes() -> None:
    flat = torch.arange(2 * 3 * 4 * 4.0).view(6, 4, 4)
    assert torch.equal(mask_per_head(flat, 2, 3)[1, 2], flat[5])
    assert torch.equal(mask_per_head(flat.view(2, 3, 4, 4), 2, 3), flat.view(2, 3, 4, 4))
    with pytest.raises(UserError, match=r"\[6, N, N\]"):
        mask_per_head(flat[:5], 2, 3)


def test_hidden_keys_get_no_weight_and_lone_queries_stay_finite() -> None:
    allowed = additive_mask(causal_mask(3), closed=float("-inf"))[None, None]
    hidden = hide_padded_keys(allowed, torch.tensor([[False, True, True]]))
    weights = torch.softmax(hidden + torch.randn(3, 3), dim=-1)[0, 0]
    assert torch.isfinite(weights).all()
    assert weights[0].tolist() == [1.0, 0.0, 0.0]
    assert (weights[1:, 0] == 0).all()


def test_masks_stay_finite_in_a_smaller_dtype_and_exact_in_others() -> None:
    closed = torch.tensor([0.0, torch.finfo(torch.float32).min, -torch.inf])
    lowest = torch.finfo(torch.bfloat16).min
    assert mask_for(torch.ones(1, dtype=torch.bfloat16), closed).tolist() == [0.0, lowest, lowest]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mask_for(torch.ones(1), closed).tolist() == [0.0, lowest, lowest]
    assert torch.equal(mask_for(torch.ones(1), closed), closed)
    wide = mask_for(torch.ones(1, dtype=torch.float64), closed)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, closed.double())
