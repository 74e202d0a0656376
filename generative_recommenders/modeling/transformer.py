"""A plain Transformer encoder (arXiv 1706.03762) with sinusoidal positions: bidirectional, or causal as an
option."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.compat.replay.attention_masks import additive_mask, causal_mask
from generative_recommenders.errors import UserError
from generative_recommenders.ops.dropout import Dropout

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries, keys and values ``[..., H, d]`` to attended values ``[..., H, d]``."""


class PositionalEncoding(nn.Module):
    """Add sin(t / 10000^(2i/D)) to even and cos(t / 10000^(2i/D)) to odd columns (section 3.5); any D."""

    pe: torch.Tensor

    def __init__(self, embedding_dim: int, max_seq_length: int = 5000) -> None:
        super().__init__()
        positions = torch.arange(max_seq_length, dtype=torch.float32)[:, None]
        angles = positions * torch.exp(
            torch.arange(0, embedding_dim, 2) * (-math.log(10000.0) / embedding_dim)
        )
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :embedding_dim]
        self.register_buffer("pe", table[None].contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; UserError where N exceeds max_seq_length."""
        if x.shape[1] > self.pe.shape[1]:
            raise UserError(f"sequence of {x.shape[1]} positions: max_seq_length is {self.pe.shape[1]}")
        return x + self.pe[:, : x.shape[1]]


class MultiHeadAttention(nn.Module):
    """softmax(q kᵀ / sqrt(d)) v over H heads, with biased projections (section 3.2.2).

    `project` and `output` act on any leading axes, so that the same weights serve jagged tokens.
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or embedding_dim % num_heads:
            raise UserError(
                f"attention: embedding_dim {embedding_dim} is not divisible by num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.w_q = nn.Linear(embedding_dim, embedding_dim)
        self.w_k = nn.Linear(embedding_dim, embedding_dim)
        self.w_v = nn.Linear(embedding_dim, embedding_dim)
        self.w_o = nn.Linear(embedding_dim, embedding_dim)
        self.dropout_rate = dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query ``[B, L, D]``, key and value ``[B, N, D]``; mask ``[B, L, N]``, 0 where a query must not
        look.

        Returns ``[B, L, D]`` and the weights ``[B, H, L, N]``, those that act: after dropout in training mode, summing to 1
        over the keys in evaluation mode. With need_weights False the weights are None and the fused kernel runs. A query
        that may look nowhere averages all.
        """
        q, k, v = self.project(query, key, value)
        additive = None if mask is None else additive_mask(mask.bool(), dtype=q.dtype)[:, None]
        if not need_weights:
            return self.output(fused_attention(q, k, v, additive, self.active_dropout)), None
        scores = torch.einsum("blhd,bnhd->bhln", q, k) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores if additive is None else scores + additive, dim=-1)
        kept = F.dropout(weights, self.active_dropout)
        return self.output(torch.einsum("bhln,bnhd->blhd", kept, v)), kept

    @property
    def active_dropout(self) -> float:
        """The rate on attention weights now: 0 in evaluation mode."""
        return self.dropout_rate if self.training else 0.0

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


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """torch's fused attention over rectangles ``[B, N, H, d]``; mask: additive, broadcast to ``[B, H, L,
    N]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)


class TransformerBlock(nn.Module):
    """y = LN(x + attention(x)), LN(y + W2 relu(W1 y)), dropout on attention weights, branches and the hidden
    layer."""

    def __init__(self, embedding_dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(embedding_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.linear1 = nn.Linear(embedding_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embedding_dim)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``; attend knows the layout and its attention mask."""
        attended = self.attention.output(attend(*self.attention.project(x, x, x)))
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class TransformerEncoder(nn.Module):
    """Token embeddings, sinusoidal positions and ``num_layers`` post-norm blocks.

    vocab_size: rows of the embedding table.
    embedding_dim: width D, odd or even; must be divisible by num_heads.
    attn_dim: width of the feed-forward's hidden layer.
    max_seq_length: rows of the position table.
    causal: whether position i sees only positions up to i.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_heads: int,
        num_layers: int,
        attn_dim: int,
        dropout: float = 0.1,
        max_seq_length: int = 1024,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.pos_encoding = PositionalEncoding(embedding_dim, max_seq_length)
        self.transformer = nn.ModuleList(
            TransformerBlock(embedding_dim, num_heads, attn_dim, dropout) for _ in range(num_layers)
        )
        self.dropout = Dropout(dropout)
        self.dropout_rate = dropout

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids int64 ``[B, N]``; attention_mask ``[B, N]``, 0 = padding. Returns ``[B, N, D]``."""
        return self.encode_embeddings(self.embedding(input_ids), attention_mask)

    def encode_embeddings(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, from embeddings ``[B, N, D]`` (masked or replaced ones, say)."""
        x = self.dropout(self.pos_encoding(embeddings))
        dropout = self.dropout_rate if self.training else 0.0
        attend = partial(fused_attention, mask=self._mask(x, attention_mask), dropout=dropout)
        for block in self.transformer:
            x = block(x, attend)
        return x

    def _mask(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        allowed = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        if self.causal:
            causal = causal_mask(x.shape[1], x.device)
            allowed = causal if allowed is None else causal & allowed
        return None if allowed is None else additive_mask(allowed, dtype=x.dtype)
