"""The plain Transformer encoder (arXiv 1706.03762) over a layout: causal, or under the layout's attention mask."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.config.fields import Share, SmallCount, Width
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.base import check_heads
from generative_recommenders.ops.attention.softmax import softmax_attention
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.recomputation import run_block


class PositionalEncoding(nn.Module):
    """Add sin(t / 10000^(2i/D)) to even and cos(t / 10000^(2i/D)) to odd columns (section 3.5); any D."""

    pe: torch.Tensor

    def __init__(self, embedding_dim: int, max_seq_length: int = 5000) -> None:
        super().__init__()
        positions = torch.arange(max_seq_length, dtype=torch.float32)[:, None]
        angles = positions * torch.exp(torch.arange(0, embedding_dim, 2) * (-math.log(10000.0) / embedding_dim))
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :embedding_dim]
        self.register_buffer("pe", table[None].contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; UserError where N exceeds max_seq_length."""
        if x.shape[1] > self.pe.shape[1]:
            raise UserError(f"sequence of {x.shape[1]} positions: max_seq_length is {self.pe.shape[1]}")
        return x + self.pe[:, : x.shape[1]]


class MultiHeadAttention(nn.Module):
    """The biased projections around attention over H heads (section 3.2.2), on any leading axes."""

    def __init__(self, embedding_dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or embedding_dim % num_heads:
            raise UserError(f"attention: embedding_dim {embedding_dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.w_q = nn.Linear(embedding_dim, embedding_dim)
        self.w_k = nn.Linear(embedding_dim, embedding_dim)
        self.w_v = nn.Linear(embedding_dim, embedding_dim)
        self.w_o = nn.Linear(embedding_dim, embedding_dim)

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[..., D]`` each to heads ``[..., H, d]``."""
        projected = self.w_q(query), self.w_k(key), self.w_v(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        return q, k, v

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Heads ``[..., H, d]`` to ``[..., D]``."""
        return self.w_o(attended.flatten(-2))


class TransformerBlock(nn.Module):
    """y = LN(x + attention(x)), LN(y + W2 relu(W1 y)), dropout on attention weights, branches and the hidden
    layer."""

    def __init__(self, embedding_dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.linear1 = nn.Linear(embedding_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embedding_dim)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``."""
        rate = self.dropout.rate if self.training else 0.0
        attended = softmax_attention(*self.attention.project(x, x, x), layout, rate)
        x = self.norm1(x + self.dropout(self.attention.output(attended)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


@register_encoder("Transformer", gin_name="transformer_encoder")
class Transformer(torch.nn.Module):
    """The post-norm Transformer with sinusoidal positions (arXiv 1706.03762); the preprocessor's learned ones come on
    top.

    ``forward(x [T, D], layout, events) -> [T, D]``, in x's float dtype. ValueError where num_heads does not divide D.

    max_length: rows of the position table.
    ffn_hidden_dim: hidden width of the feed-forward.
    """

    causal = True

    def __init__(
        self,
        embedding_dim: int,
        max_length: int,
        num_blocks: SmallCount = 2,
        num_heads: SmallCount = 1,
        ffn_hidden_dim: Width = 64,
        dropout_rate: Share = 0.1,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.positions = PositionalEncoding(embedding_dim, max_length)
        self.dropout = Dropout(dropout_rate)
        self.blocks = torch.nn.ModuleList(
            TransformerBlock(embedding_dim, num_heads, ffn_hidden_dim, dropout_rate) for _ in range(num_blocks)
        )

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events are not used."""
        x = self.dropout(x + self.positions.pe[0].index_select(0, layout.positions))
        for block in self.blocks:
            x = run_block(block, self.activation_checkpoint and self.training, x, layout)
        return layout.mask(x)
