"""Options that an encoder cannot be built with: refused before anything runs."""

from __future__ import annotations

import pytest

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.diff_transformer import DiffTransformer
from generative_recommenders.modeling.encoders.fuxi import FuXi
from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.encoders.ligr import LiGR
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.encoders.transformer import Transformer

LONGEST = {"max_length": 6}


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (SASRec, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (SASRec, {"num_blocks": 0}, "sasrec_encoder.num_blocks must be 1 or more, got 0"),
        (SASRec, {"num_blocks": 1.0}, "sasrec_encoder.num_blocks must be of type int, got 1.0"),
        (SASRec, {"ffn_hidden_dim": 0}, "ffn_hidden_dim must be 1 or more, got 0"),
        (SASRec, {"ffn_activation_fn": "tanh"}, "ffn_activation_fn 'tanh' is unknown; known: 'relu', 'gelu', 'silu'"),
        (SASRec, {"ffn_dropout_rate": 1.0}, "ffn_dropout_rate must be below 1, got 1.0"),
        (DiffTransformer, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (DiffTransformer, {"num_blocks": -1}, "num_blocks must be 1 or more, got -1"),
        (DiffTransformer, {"norm": "middle"}, "norm 'middle' is unknown; known: 'post', 'pre'"),
        (Transformer, {"max_length": 6, "num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (Transformer, {"max_length": 6, "num_heads": 0}, "num_heads must be 1 or more, got 0"),
        (Transformer, {"max_length": 6, "num_blocks": 0}, "num_blocks must be 1 or more, got 0"),
        (Transformer, {"max_length": 6, "ffn_hidden_dim": 0}, "ffn_hidden_dim must be 1 or more, got 0"),
        (LiGR, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (LiGR, {"ffn_multiply": 0}, "ffn_multiply must be 1 or more, got 0"),
        (LiGR, {"ffn_activation_fn": "silu"}, "'silu' is unknown; known: 'swiglu', 'relu', 'gelu'"),
        (LiGR, {"dropout_rate": 1.0}, "dropout_rate must be below 1, got 1.0"),
        (FuXi, {"max_length": 6, "dqk": 0}, "dqk must be 1 or more, got 0"),
        (FuXi, {"max_length": 6, "normalization": "softmax"}, "normalization 'softmax' is unknown"),
        (FuXi, {"max_length": 6, "linear_activation": "gelu"}, "linear_activation 'gelu' is unknown"),
        (FuXi, {"max_length": 6, "attn_dropout_rate": 1.0}, "attn_dropout_rate must be below 1, got 1.0"),
        (HSTU, {"max_length": 6, "num_blocks": 0}, "hstu_encoder.num_blocks must be 1 or more, got 0"),
        (HSTU, {"max_length": 6, "num_heads": 0}, "num_heads must be 1 or more, got 0"),
        (HSTU, {"max_length": 6, "dv": -1}, "dv must be 1 or more, got -1"),
        (HSTU, {"max_length": 6, "normalization": "softmax"}, "known: 'rel_bias', 'softmax_rel_bias'"),
        (HSTU, {"max_length": 6, "linear_config": "uv"}, "linear_config 'uv' is unknown"),
        (HSTU, {"max_length": 6, "linear_activation": "gelu"}, "linear_activation 'gelu' is unknown"),
        (HSTU, {"max_length": 6, "next_time": "unknown"}, "next_time 'unknown' is unknown; known: 'given', 'hidden'"),
        (
            HSTU,
            {"max_length": 6, "attn_divisor": "length", "normalization": "softmax_rel_bias"},
            'attn_divisor "length" acts with normalization "rel_bias" alone',
        ),
        (HSTU, {"max_length": 6, "attn_divisor": "tokens"}, "attn_divisor 'tokens' is unknown"),
        (HSTU, {"max_length": 6, "attn_dropout_rate": 1.0}, "attn_dropout_rate must be below 1, got 1.0"),
        (HSTU, {"max_length": 6, "linear_dropout_rate": -0.1}, "linear_dropout_rate must be 0 or more, got -0.1"),
    ],
)
def test_refused(encoder: type, options: dict, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message) as refused:
        encoder(8, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rate", [-0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("encoder", "option", "options"),
    [(SASRec, "ffn_dropout_rate", {}), (HSTU, "attn_dropout_rate", LONGEST), (FuXi, "attn_dropout_rate", LONGEST)],
)
def test_rates_of_derived_encoders_are_refused(encoder: type, option: str, options: dict, rate: float) -> None:
    class Derived(encoder):
        pass

    with pytest.raises(ValueError, match=str(rate)):
        Derived(8, **options, **{option: rate})
