from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from generative_recommenders.compat.genrec.transformer import MultiHeadAttention, TransformerEncoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.transformer import PositionalEncoding
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.layout import Visibility, jagged_layout


def _torch_twin(encoder: TransformerEncoder, heads: int, hidden: int) -> nn.TransformerEncoder:
    """torch's own encoder with the same weights."""
    width = encoder.embedding.embedding_dim
    layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.1, batch_first=True)
    twin = nn.TransformerEncoder(layer, len(encoder.transformer), enable_nested_tensor=False)
    for block, theirs in zip(encoder.transformer, twin.layers):
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(8, 2), (9, 3)])
def test_equals_torchs_encoder(causal: bool, width: int, heads: int) -> None:
    encoder = TransformerEncoder(20, width, heads, 2, 12, causal=causal).eval()
    twin = _torch_twin(encoder, heads, 12).eval()
    ids = torch.randint(0, 20, (3, 6))
    real = torch.arange(6) < torch.tensor([[6], [3], [1]])
    positions = PositionalEncoding(width)(encoder.embedding(ids))
    causal_closed = ~torch.ones(6, 6).tril().bool() if causal else None
    expected = twin(positions, mask=causal_closed, src_key_padding_mask=~real)
    assert torch.allclose(encoder(ids, real.long())[real], expected[real], atol=1e-5)
    without_padding = twin(positions, mask=causal_closed)
    assert torch.allclose(encoder(ids), without_padding, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_positions_are_sines_and_cosines(width: int) -> None:
    encoded = PositionalEncoding(width, 50)(torch.zeros(2, 30, width))
    for t, column in ((0, 0), (3, width - 1), (29, width // 2)):
        angle = t / 10000 ** ((column - column % 2) / width)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert encoded[1, t, column].item() == pytest.approx(expected, abs=1e-5)


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="max_seq_length is 4"):
        TransformerEncoder(5, 4, 1, 1, 4, max_seq_length=4)(torch.zeros(1, 5, dtype=torch.int64))


def test_attention_returns_weights_when_asked() -> None:
    attention = MultiHeadAttention(8, 2).eval()
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    mask = torch.rand(3, 4, 6) > 0.3
    mask[:, :, 0] = True
    mask[0, 0] = False
    out, weights = attention(query, keys, keys, mask)
    fused, none = attention(query, keys, keys, mask, need_weights=False)
    assert none is None
    assert torch.allclose(out, fused, atol=1e-6)
    assert weights.shape == (3, 2, 4, 6)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 4))
    hidden = weights.masked_fill(mask[:, None], 0.0)
    assert torch.equal(hidden[1:], torch.zeros(2, 2, 4, 6))
    assert torch.allclose(weights[0, :, 0], torch.full((2, 6), 1 / 6))


def test_attention_is_its_equation() -> None:
    attention = MultiHeadAttention(6, 3, dropout=0.0)
    x = torch.randn(1, 5, 6)
    out, weights = attention(x, x, x)
    q, k, v = (w(x)[0].view(5, 3, 2) for w in (attention.w_q, attention.w_k, attention.w_v))
    heads = [torch.softmax(q[:, h] @ k[:, h].T / 2**0.5, -1) for h in range(3)]
    assert torch.allclose(weights[0], torch.stack(heads), atol=1e-6)
    expected = attention.w_o(torch.cat([a @ v[:, h] for h, a in enumerate(heads)], -1))
    assert torch.allclose(out[0], expected, atol=1e-6)


def test_rows_of_padding_stay_finite() -> None:
    encoder = TransformerEncoder(10, 8, 2, 2, 8)
    encoder(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0] * 4, [1] * 4])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_embeddings_can_be_given() -> None:
    encoder = TransformerEncoder(10, 8, 2, 1, 8).eval()
    ids = torch.randint(0, 10, (2, 4))
    assert torch.equal(encoder.encode_embeddings(encoder.embedding(ids)), encoder(ids))


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_takes_the_attention_of_its_layout(causal: bool) -> None:
    encoder = TransformerEncoder(10, 8, 2, 1, 8, causal=causal).eval()
    ids, lengths = torch.randint(0, 10, (3, 5)), torch.tensor([5, 2, 3])
    layout = jagged_layout(lengths, 5)
    if not causal:
        tokens = layout.positions
        layout = layout.with_visibility(
            Visibility(key=torch.zeros_like(tokens), query=torch.zeros_like(tokens))
        )
    x = layout.flatten(encoder.pos_encoding(encoder.embedding(ids)))
    out = encoder.transformer[0](x, partial(softmax_attention, layout=layout))
    real = torch.arange(5) < lengths[:, None]
    assert torch.allclose(out, encoder(ids, real)[real], atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    encoder = TransformerEncoder(10, 8, 2, 1, 8, dropout=0.5)
    ids = torch.randint(0, 10, (2, 4))
    assert not torch.equal(encoder(ids), encoder(ids))
    encoder.eval()
    assert torch.equal(encoder(ids), encoder(ids))
