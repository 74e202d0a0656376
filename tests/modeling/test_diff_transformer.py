"""DiffTransformer encoder against golden numbers and RePlay's dense layer."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.mask import additive_mask, causal_mask
from generative_recommenders.compat.replay.nn.sequential import DiffTransformerLayer
from generative_recommenders.modeling.encoders.diff_transformer import DiffTransformer
from generative_recommenders.ops.layout import jagged_layout
from golden_parity import assert_near, load_golden, load_parameters

LENGTHS = torch.tensor([5, 1, 0, 3])
WIDTH, COLUMNS, HEADS = 8, 6, 2


def test_parity_with_golden_layer() -> None:
    """Left-padded there, jagged here; padded positions have no meaning and are not compared."""
    golden = load_golden("replay_diff_layer")
    c = golden.config
    encoder = DiffTransformer(c["D"], c["num_blocks"], c["heads"])
    load_parameters(encoder, golden.parameters)
    real = golden.inputs["padding_mask"]
    layout = jagged_layout(real.sum(1), c["L"])
    assert_near(encoder(golden.inputs["x"][real], layout, {}), golden.outputs["out"][real])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_equals_the_dense_layer_with_gradients(norm: str) -> None:
    dense = DiffTransformerLayer(WIDTH, HEADS, 2, norm)
    encoder = DiffTransformer(WIDTH, 2, HEADS, norm)
    encoder.load_state_dict(dense.state_dict())
    x = torch.randn(len(LENGTHS), COLUMNS, WIDTH)
    layout, real = jagged_layout(LENGTHS, COLUMNS), torch.arange(COLUMNS) < LENGTHS[:, None]
    mask = additive_mask(causal_mask(COLUMNS)).expand(len(LENGTHS) * HEADS, COLUMNS, COLUMNS)
    pull = torch.randn(int(LENGTHS.sum()), WIDTH)
    expected, actual = dense(x, mask)[real], encoder(x[real], layout, {})
    torch.testing.assert_close(actual, expected)
    (expected * pull).sum().backward()
    (actual * pull).sum().backward()
    for ours, theirs in zip(encoder.parameters(), dense.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
