"""LiGR (arXiv 2502.03417): a pre-norm Transformer whose residuals are gated; with sampled softmax, eSASRec (arXiv
2508.06450).

A block, over the tokens x of a batch; LN has weights and eps 1e-5, D is dropout, and every gate has weights of its own:

    y = x + sigmoid(x W_a + b_a) * D(attention(LN(x)))     softmax attention over the past, dropout on its weights too
    z = y + sigmoid(y W_f + b_f) * D(feed_forward(LN(y)))
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

from generative_recommenders.config.fields import Share, SmallCount
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.modeling.cache import Appended, KeysValues, softmax_over_cache
from generative_recommenders.modeling.encoders.base import BlockEncoder, check_heads
from generative_recommenders.ops.attention.multi_head import (
    last_token_attention,
    multi_head_attention,
    project_heads,
)
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import SwiGLU
from generative_recommenders.ops.layout import Layout

Activation = Literal["swiglu", "relu", "gelu"]


class LigrBlock(torch.nn.Module):
    """One block of the equations above. ffn_activation_fn: "swiglu", or that of a feed-forward of two layers."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        ffn_hidden_dim: int,
        ffn_activation_fn: Activation = "swiglu",
        ffn_bias: bool = False,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = Dropout(dropout_rate)
        self.attn_norm = torch.nn.LayerNorm(embedding_dim)
        self.in_proj = torch.nn.Linear(embedding_dim, 3 * embedding_dim)
        self.out_proj = torch.nn.Linear(embedding_dim, embedding_dim)
        self.attn_gate = torch.nn.Linear(embedding_dim, embedding_dim)
        self.ffn_norm = torch.nn.LayerNorm(embedding_dim)
        self.ffn: torch.nn.Module
        if ffn_activation_fn == "swiglu":
            self.ffn = SwiGLU(embedding_dim, ffn_hidden_dim, ffn_bias, dropout_rate)
        else:
            self.ffn = torch.nn.Sequential(
                torch.nn.Linear(embedding_dim, ffn_hidden_dim, ffn_bias),
                torch.nn.ReLU() if ffn_activation_fn == "relu" else torch.nn.GELU(),
                Dropout(dropout_rate),
                torch.nn.Linear(ffn_hidden_dim, embedding_dim, ffn_bias),
            )
        self.ffn_gate = torch.nn.Linear(embedding_dim, embedding_dim)
        for linear in (each for each in self.modules() if isinstance(each, torch.nn.Linear)):
            torch.nn.init.xavier_normal_(linear.weight)
        torch.nn.init.zeros_(self.in_proj.bias)
        torch.nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x: ``[T, D]``; returns the same shape."""
        normed = self.attn_norm(x)
        rate = self.dropout.rate if self.training else 0.0
        attended = multi_head_attention(normed, normed, self.in_proj, self.out_proj, self.num_heads, layout, rate)
        return layout.mask(self.combine(x, attended))

    def combine(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """z, from what the attention adds; ``[T, D]`` each."""
        y = x + F.sigmoid(self.attn_gate(x)) * self.dropout(attended)
        return y + F.sigmoid(self.ffn_gate(y)) * self.dropout(self.ffn(self.ffn_norm(y)))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H, D / H]`` each."""
        normed = self.attn_norm(x)
        k, v = (project_heads(normed, self.in_proj, self.num_heads, part) for part in (1, 2))
        return k, v

    def over_cache(self, x: torch.Tensor, block: KeysValues, appended: Appended) -> torch.Tensor:
        """`forward` of the tokens ``x [T, D]`` alone, over what the block keeps of all."""
        q = project_heads(self.attn_norm(x), self.in_proj, self.num_heads, 0)
        return self.combine(x, self.out_proj(softmax_over_cache(q, block, appended).flatten(1)))

    def over_inputs(self, x: torch.Tensor, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See `BlockEncoder`."""
        q = project_heads(self.attn_norm(x), self.in_proj, self.num_heads, 0)
        return self.combine(x, self.out_proj(last_token_attention(q, self.in_proj, self.attn_norm(inputs), lengths)))


@register_encoder("LiGR", gin_name="ligr_encoder")
class LiGR(BlockEncoder):
    """LiGR: a stack of `LigrBlock`, a pre-norm Transformer with gated residuals (arXiv 2502.03417); no norm after the
    last.

    ``forward(x [T, D], layout, events) -> [T, D]``, in x's float dtype. ValueError where num_heads does not divide D.

    ffn_multiply: hidden width of the feed-forward over D.
    ffn_activation_fn: "swiglu" for gated units of three weights, else the activation between two.
    ffn_bias: the feed-forward's layers carry biases.
    dropout_rate: dropout on the attention's weights and on what each branch adds.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_blocks: SmallCount = 2,
        num_heads: SmallCount = 1,
        ffn_multiply: Annotated[int, Ge(1), Le(64)] = 4,
        ffn_activation_fn: Activation = "swiglu",
        ffn_bias: bool = False,
        dropout_rate: Share = 0.2,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        hidden = ffn_multiply * embedding_dim
        self.blocks = torch.nn.ModuleList(
            LigrBlock(embedding_dim, num_heads, hidden, ffn_activation_fn, ffn_bias, dropout_rate)
            for _ in range(num_blocks)
        )
