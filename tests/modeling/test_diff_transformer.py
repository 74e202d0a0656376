"""DiffTransformer encoder against golden numbers and RePlay's dense layer."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.mask import additive_mask, causal_mask
from generative_recommenders.compat.replay.nn.sequential import DiffTransformerLayer
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.diff_transformer import DiffTransformer
from generative_recommenders.ops.layout import AttentionMask, jagged_layout, padded_layout
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


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padded_equals_jagged(bidirectional: bool) -> None:
    encoder = DiffTransformer(WIDTH, 2, HEADS)
    x = torch.randn(len(LENGTHS), COLUMNS, WIDTH)
    outputs = []
    for layout in (jagged_layout(LENGTHS, COLUMNS), padded_layout(LENGTHS, COLUMNS)):
        everyone = torch.zeros(layout.num_tokens, dtype=torch.int64)
        seen = layout.with_attention_mask(AttentionMask(everyone, everyone)) if bidirectional else layout
        outputs.append(layout.to_rectangle(encoder(layout.flatten(x), seen, {})))
    torch.testing.assert_close(*outputs)


def test_dropout_acts_in_training_alone() -> None:
    encoder = DiffTransformer(WIDTH, 1, HEADS, dropout_rate=0.5)
    x, layout = torch.randn(9, WIDTH), jagged_layout(LENGTHS, COLUMNS)
    assert not torch.equal(encoder(x, layout, {}), encoder(x, layout, {}))
    encoder.eval()
    assert torch.equal(encoder(x, layout, {}), encoder(x, layout, {}))


def test_checkpointed_activations_change_nothing() -> None:
    torch.manual_seed(0)
    plain = DiffTransformer(WIDTH, 2, HEADS)
    again = DiffTransformer(WIDTH, 2, HEADS, activation_checkpoint=True)
    again.load_state_dict(plain.state_dict())
    x, layout = torch.randn(9, WIDTH), jagged_layout(LENGTHS, COLUMNS)
    for encoder in (plain, again):
        encoder(x, layout, {}).square().sum().backward()
    for one, other in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide the width 8"):
        DiffTransformer(WIDTH, 1, 3)
    with pytest.raises(UserError, match="'middle'"):
        DiffTransformer(WIDTH, 1, 2, norm="middle")  # type: ignore[arg-type]
