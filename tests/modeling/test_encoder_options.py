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
from generative_recommenders.modeling.encoders.two_tower import ItemTower


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (SASRec, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (SASRec, {"num_blocks": 0}, "num_blocks 0 must be 1 or more"),
        (SASRec, {"ffn_hidden_dim": 0}, "ffn_hidden_dim 0 must be 1 or more"),
        (SASRec, {"ffn_activation_fn": "tanh"}, "unknown activation 'tanh'; known: relu, gelu, silu"),
        (SASRec, {"ffn_dropout_rate": 1.0}, "dropout rate must be in"),
        (DiffTransformer, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (DiffTransformer, {"num_blocks": -1}, "num_blocks -1 must be 1 or more"),
        (Transformer, {"max_length": 6, "num_heads": 0}, "num_heads 0 does not divide the width 8"),
        (Transformer, {"max_length": 6, "num_blocks": 0}, "num_blocks 0 must be 1 or more"),
        (Transformer, {"max_length": 6, "ffn_hidden_dim": 0}, "ffn_hidden_dim 0 must be 1 or more"),
        (LiGR, {"num_heads": 3}, "num_heads 3 does not divide the width 8"),
        (LiGR, {"ffn_multiply": 0}, "ffn_multiply 0 must be 1 or more"),
        (LiGR, {"ffn_activation_fn": "silu"}, "unknown ffn_activation_fn 'silu'; known: swiglu, relu, gelu"),
        (LiGR, {"dropout_rate": 1.0}, "dropout rate must be in"),
        (FuXi, {"max_length": 6, "dqk": 0}, "dqk 0 must be 1 or more"),
        (FuXi, {"max_length": 6, "normalization": "softmax"}, "unknown normalization 'softmax'"),
        (FuXi, {"max_length": 6, "linear_activation": "gelu"}, "unknown linear_activation"),
        (FuXi, {"max_length": 6, "attn_dropout_rate": 1.0}, "dropout rate must be in"),
        (HSTU, {"max_length": 6, "num_blocks": 0}, "num_blocks 0 must be 1 or more"),
        (HSTU, {"max_length": 6, "num_heads": 0}, "num_heads 0 must be 1 or more"),
        (HSTU, {"max_length": 6, "dv": -1}, "dv -1 must be 1 or more"),
        (
            HSTU,
            {"max_length": 6, "next_time": "unknown"},
            "unknown next_time 'unknown'; known: given, hidden",
        ),
        (
            HSTU,
            {"max_length": 6, "attn_divisor": "length", "normalization": "softmax_rel_bias"},
            'attn_divisor "length" acts with normalization "rel_bias" alone',
        ),
        (HSTU, {"max_length": 6, "attn_divisor": "tokens"}, "unknown attn_divisor 'tokens'"),
        (HSTU, {"max_length": 6, "attn_dropout_rate": 1.0}, "dropout rate must be in"),
        (HSTU, {"max_length": 6, "linear_dropout_rate": -0.1}, "dropout rate must be in"),
    ],
)
def test_refused(encoder: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        encoder(8, **options)
    assert "\n" not in str(refused.value)


def test_an_item_tower_without_layers() -> None:
    with pytest.raises(UserError, match=r"item_tower.num_blocks 0 must be 1 or more"):
        ItemTower([], 8, 0)
