"""genrec's attention and encoder over padded rectangles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.mask import additive_mask
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders import transformer
from generative_recommenders.modeling.encoders.base import check_heads
from generative_recommenders.modeling.encoders.transformer import PositionalEncoding


class MultiHeadAttention(transformer.MultiHeadAttention):
    """softmax(q kᵀ / sqrt(d)) v over H heads of rectangles, with genrec's documented attributes.

    ``dropout`` is a module; its ``p`` is the rate that acts. ``head_dim`` is D / H, ``scale`` its square root.
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__(embedding_dim, num_heads)
        self.embedding_dim = embedding_dim
        self.head_dim = embedding_dim // num_heads
        self.dropout = nn.Dropout(dropout)
        self.scale = math.sqrt(self.head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """query ``[B, L, D]``, key and value ``[B, N, D]``; mask ``[B, L, N]``, 0 where a query must not look.

        Returns ``[B, L, D]`` and the weights ``[B, H, L, N]`` after dropout; in evaluation mode they sum to 1 over the
        keys. A query that may look nowhere averages all. ``UserError`` for a mask of other than 3 axes.
        """
        if mask is not None and mask.dim() != 3:  # [L, N] would be one mask a head where L is their number
            raise UserError(f"MultiHeadAttention: the mask is {tuple(mask.shape)}: give [B, L, N]")
        q, k, v = self.project(query, key, value)
        scores = torch.einsum("blhd,bnhd->bhln", q, k) / self.scale
        if mask is not None:
            scores = scores + additive_mask(mask.bool(), dtype=q.dtype)[:, None]
        weights = F.dropout(torch.softmax(scores, dim=-1), self.dropout.p, self.dropout.training)
        return self.output(torch.einsum("bhln,bnhd->blhd", weights, v)), weights


class TransformerEncoder(nn.Module):
    """Token embeddings, sinusoidal positions and torch's own encoder of ``num_layers`` post-norm layers.

    vocab_size: rows of the embedding table.
    embedding_dim: width D, odd or even; must be divisible by num_heads.
    attn_dim: width of the feed-forward's hidden layer.
    max_seq_length: rows of the position table.
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
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.pos_encoding = PositionalEncoding(embedding_dim, max_seq_length)
        layer = nn.TransformerEncoderLayer(embedding_dim, num_heads, attn_dim, dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids int64 ``[B, N]``; attention_mask ``[B, N]``, 0 = padding. Returns ``[B, N, D]``, finite in rows of
        padding alone too."""
        x = self.dropout(self.pos_encoding(self.embedding(input_ids)))
        padding = None
        if attention_mask is not None:
            padding = attention_mask == 0
            padding = padding & ~padding.all(1, keepdim=True)  # a softmax over no key at all is NaN
        return self.transformer(x, src_key_padding_mask=padding)
