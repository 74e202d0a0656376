"""genrec's attention and encoder over padded rectangles, on the blocks of the Transformer encoder."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.compat.replay.nn.mask import additive_mask, causal_mask
from generative_recommenders.modeling.encoders import transformer
from generative_recommenders.modeling.encoders.transformer import PositionalEncoding, TransformerBlock
from generative_recommenders.ops.dropout import Dropout


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
        rate = self.dropout.p if self.dropout.training else 0.0
        if not need_weights:
            return self.output(fused_attention(q, k, v, additive, rate)), None
        scores = torch.einsum("blhd,bnhd->bhln", q, k) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores if additive is None else scores + additive, dim=-1)
        kept = F.dropout(weights, rate)
        return self.output(torch.einsum("bhln,bnhd->blhd", kept, v)), kept


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """torch's fused attention over rectangles ``[B, N, H, d]``; mask: additive, broadcast to ``[B, H, L,
    N]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)


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
