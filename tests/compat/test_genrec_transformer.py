"""Genrec's Transformer encoder and attention against torch's and their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from generative_recommenders.compat.genrec.transformer import MultiHeadAttention, TransformerEncoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.transformer import PositionalEncoding


@pytest.mark.parametrize(("width", "heads"), [(8, 2), (9, 3)])
def test_draws_and_loads_as_torchs_encoder(width: int, heads: int) -> None:
    torch.manual_seed(4)
    encoder = TransformerEncoder(20, width, heads, 2, 12).eval()
    torch.manual_seed(4)
    embedding = nn.Embedding(20, width)
    layer = nn.TransformerEncoderLayer(width, heads, 12, 0.1, batch_first=True)
    twin = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    own = encoder.state_dict()
    assert all(torch.equal(own[f"transformer.{name}"], value) for name, value in twin.state_dict().items())
    assert torch.equal(own["embedding.weight"], embedding.weight)
    encoder.transformer.load_state_dict(twin.state_dict())
    ids = torch.randint(0, 20, (3, 6))
    real = torch.arange(6) < torch.tensor([[6], [3], [1]])
    positions = PositionalEncoding(width)(encoder.embedding(ids))
    expected = twin(positions, src_key_padding_mask=~real)
    assert torch.allclose(encoder(ids, real.long())[real], expected[real], atol=1e-5)
    assert torch.allclose(encoder(ids), twin(positions), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(encoder(ids, real.long())[real], expected[real], atol=1e-5)


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


def test_attention_returns_its_weights() -> None:
    attention = MultiHeadAttention(8, 2).eval()
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    mask = torch.rand(3, 4, 6) > 0.3
    mask[:, :, 0] = True
    mask[0, 0] = False
    _, weights = attention(query, keys, keys, mask)
    assert weights.shape == (3, 2, 4, 6)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 4))
    hidden = weights.masked_fill(mask[:, None], 0.0)
    assert torch.equal(hidden[1:], torch.zeros(2, 2, 4, 6))
    assert torch.allclose(weights[0, :, 0], torch.full((2, 6), 1 / 6))


def test_a_mask_without_the_axis_of_rows_is_refused() -> None:
    """Where a row has as many queries as there are heads, it would broadcast over these."""
    x = torch.randn(3, 2, 8)
    with pytest.raises(UserError, match=r"the mask is \(2, 2\): give \[B, L, N\]"):
        MultiHeadAttention(8, 2)(x, x, x, torch.ones(2, 2).tril())


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
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0] * 4, [1] * 4])
    encoder(ids, mask).sum().backward()
    with torch.no_grad():
        assert torch.isfinite(encoder.eval()(ids, mask)).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_dropout_acts_in_training_only() -> None:
    encoder = TransformerEncoder(10, 8, 2, 1, 8, dropout=0.5)
    ids = torch.randint(0, 10, (2, 4))
    assert not torch.equal(encoder(ids), encoder(ids))
    encoder.eval()
    assert torch.equal(encoder(ids), encoder(ids))
