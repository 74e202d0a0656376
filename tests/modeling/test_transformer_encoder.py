"""Transformer encoder against torch's, its attention mask, and its positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from generative_recommenders.modeling.encoders.transformer import PositionalEncoding, Transformer
from generative_recommenders.ops.layout import AttentionMask, jagged_layout, padded_layout

LENGTHS = torch.tensor([5, 1, 3])
WIDTH, COLUMNS = 8, 6


def everyone(layout):
    zeros = torch.zeros(layout.num_tokens, dtype=torch.int64)
    return layout.with_attention_mask(AttentionMask(zeros, zeros))


def torchs_encoder(encoder: Transformer) -> nn.TransformerEncoder:
    """torch's own layers with the same weights."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    twin = nn.TransformerEncoder(layer, len(encoder.blocks), enable_nested_tensor=False)
    for block, theirs in zip(encoder.blocks, twin.layers):
        a = block.attention
        packed = {
            "self_attn.in_proj_weight": torch.cat([a.w_q.weight, a.w_k.weight, a.w_v.weight]),
            "self_attn.in_proj_bias": torch.cat([a.w_q.bias, a.w_k.bias, a.w_v.bias]),
            "self_attn.out_proj.weight": a.w_o.weight,
            "self_attn.out_proj.bias": a.w_o.bias,
        }
        own = {k: v for k, v in block.state_dict().items() if not k.startswith("attention.")}
        theirs.load_state_dict(packed | own)
    return twin


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("make_layout", [jagged_layout, padded_layout])
def test_equals_torchs_encoder(causal: bool, make_layout) -> None:
    encoder = Transformer(WIDTH, COLUMNS, 2, 2, 16, dropout_rate=0.0)
    x, real = torch.randn(len(LENGTHS), COLUMNS, WIDTH), torch.arange(COLUMNS) < LENGTHS[:, None]
    mask = ~torch.ones(COLUMNS, COLUMNS).tril().bool() if causal else None
    positions = PositionalEncoding(WIDTH, COLUMNS)
    expected = torchs_encoder(encoder)(positions(x), mask=mask, src_key_padding_mask=~real)
    layout = make_layout(LENGTHS, COLUMNS)
    states = encoder(layout.flatten(x), layout if causal else everyone(layout), {})
    torch.testing.assert_close(layout.to_rectangle(states)[real], expected[real])


def test_order_matters_by_the_sinusoids_alone() -> None:
    encoder = Transformer(WIDTH, COLUMNS, 1, 2, 16, dropout_rate=0.0)
    layout = everyone(jagged_layout(torch.tensor([4]), COLUMNS))
    x = torch.randn(4, WIDTH)
    assert (encoder(x, layout, {}) - encoder(x.flip(0), layout, {}).flip(0)).abs().max() > 1e-3
    encoder.positions.pe.zero_()
    torch.testing.assert_close(encoder(x, layout, {}), encoder(x.flip(0), layout, {}).flip(0))
