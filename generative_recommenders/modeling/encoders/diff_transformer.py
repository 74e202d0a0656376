"""DiffTransformer over a layout (arXiv 2410.05258): two softmax attentions over shared values, one taken off
the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from generative_recommenders.config.registry import register_encoder
from generative_recommenders.modeling.encoders.checks import check_heads, check_positive
from generative_recommenders.modeling.encoders.differential_attention import (
    DiffTransformerBlock,
    lambda_init_of_block,
)
from generative_recommenders.ops.attention import softmax_attention
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.recomputation import run_block


class LayoutDiffBlock(DiffTransformerBlock):
    """`DiffTransformerBlock` with the same weights and numbers over the tokens of a layout.

    dropout_rate: on the probabilities of both attentions and on what each branch adds to its residual.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        lambda_init: float,
        norm: Literal["post", "pre"] = "post",
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__(embedding_dim, num_heads, lambda_init, norm)
        self.dropout = Dropout(dropout_rate)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:  # type: ignore[override]
        """x: ``[T, D]``; returns the same shape."""
        if self.norm == "pre":
            x = x + self.attend(self.attn_norm(x), layout)
            return layout.mask(x + self.dropout(self.ff(self.ff_norm(x))))
        x = self.attn_norm(x + self.attend(x, layout))
        return layout.mask(self.ff_norm(x + self.dropout(self.ff(x))))

    def attend(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(softmax(q1 k1ᵀ / sqrt(dq)) - lambda softmax(q2 k2ᵀ / sqrt(dq))) v, ``[T, D]`` (eq. 1)."""
        heads = self.attn.project(x, x, x)
        rate = self.dropout.rate if self.training else 0.0
        first = softmax_attention(heads.q1, heads.k1, heads.v, layout, rate)
        second = softmax_attention(heads.q2, heads.k2, heads.v, layout, rate)
        return self.dropout(self.attn.combine(first, second))


@register_encoder("DiffTransformer", gin_name="diff_transformer_encoder")
class DiffTransformer(torch.nn.Module):
    """A stack of `LayoutDiffBlock` with lambda_init = 0.8 - 0.6 exp(-0.3 block); no norm behind the last.

    norm: "post" (RePlay's form) or "pre" (the paper's).
    """

    causal = True

    def __init__(
        self,
        embedding_dim: int,
        num_blocks: int = 2,
        num_heads: int = 1,
        norm: Literal["post", "pre"] = "post",
        dropout_rate: float = 0.0,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        check_positive(num_blocks=num_blocks)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.layers = torch.nn.ModuleList(
            LayoutDiffBlock(embedding_dim, num_heads, lambda_init_of_block(block), norm, dropout_rate)
            for block in range(num_blocks)
        )

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events are not used."""
        for block in self.layers:
            x = run_block(block, self.activation_checkpoint and self.training, x, layout)
        return x
