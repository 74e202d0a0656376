from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.genrec.transformer import TransformerEncoder
from generative_recommenders.modeling.encoders.transformer import Transformer
from generative_recommenders.ops.layout import Visibility, jagged_layout, padded_layout

LENGTHS = torch.tensor([5, 1, 3])
WIDTH, COLUMNS = 8, 6


def everyone(layout):
    zeros = torch.zeros(layout.num_tokens, dtype=torch.int64)
    return layout.with_visibility(Visibility(zeros, zeros))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("make_layout", [jagged_layout, padded_layout])
def test_equals_the_dense_encoder(causal: bool, make_layout) -> None:
    dense = TransformerEncoder(10, WIDTH, 2, 2, 16, dropout=0.0, max_seq_length=COLUMNS, causal=causal)
    encoder = Transformer(WIDTH, COLUMNS, 2, 2, 16, dropout_rate=0.0)
    encoder.blocks.load_state_dict(dense.transformer.state_dict())
    x, real = torch.randn(len(LENGTHS), COLUMNS, WIDTH), torch.arange(COLUMNS) < LENGTHS[:, None]
    expected = dense.encode_embeddings(x, real)
    layout = make_layout(LENGTHS, COLUMNS)
    states = encoder(layout.flatten(x), layout if causal else everyone(layout), {})
    torch.testing.assert_close(layout.to_rectangle(states)[real], expected[real])


def test_who_sees_whom_follows_the_layout() -> None:
    encoder = Transformer(WIDTH, COLUMNS, 1, 2, 16, dropout_rate=0.0)
    layout = jagged_layout(torch.tensor([4]), COLUMNS)
    x = torch.randn(4, WIDTH)
    other = torch.cat([x[:3], torch.randn(1, WIDTH)])
    causal, changed = encoder(x, layout, {}), encoder(other, layout, {})
    torch.testing.assert_close(causal[:3], changed[:3])
    both, changed = encoder(x, everyone(layout), {}), encoder(other, everyone(layout), {})
    assert (both[:3] - changed[:3]).abs().amax(1).min() > 1e-4


def test_order_matters_by_the_sinusoids_alone() -> None:
    encoder = Transformer(WIDTH, COLUMNS, 1, 2, 16, dropout_rate=0.0)
    layout = everyone(jagged_layout(torch.tensor([4]), COLUMNS))
    x = torch.randn(4, WIDTH)
    assert (encoder(x, layout, {}) - encoder(x.flip(0), layout, {}).flip(0)).abs().max() > 1e-3
    encoder.positions.pe.zero_()
    torch.testing.assert_close(encoder(x, layout, {}), encoder(x.flip(0), layout, {}).flip(0))


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="num_heads 3"):
        Transformer(WIDTH, COLUMNS, num_heads=3)
