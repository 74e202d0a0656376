"""RePlay's encoders over padded rectangles, with dense masks: SASRec's blocks (arXiv 1808.09781) and the differential
Transformer (arXiv 2410.05258)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.attention import MultiHeadDifferentialAttention
from generative_recommenders.compat.replay.nn.ffn import Activation, PointWiseFeedForward
from generative_recommenders.compat.replay.nn.mask import hide_padded_keys, mask_for, mask_per_head
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders import diff_transformer as core

LAYER_NORM_EPS = 1e-8  # of the published SASRec, and so of RePlay's checkpoints


class SasRecTransformerLayer(nn.Module):
    """``num_blocks`` blocks of attention and feed-forward.

    Per block q = LN(x), y = LN(q + attention(q, x, x)), x = y + feed-forward(y): the residual is the normed query.

    dropout: rate on attention weights and in the feed-forward.
    activation: "gelu" or "relu".
    hidden_dim: width inside the feed-forward, D unless given.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        num_blocks: int,
        dropout: float,
        activation: Activation = "gelu",
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embedding_dim % num_heads:
            raise UserError(f"SasRec layer: embedding_dim {embedding_dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        attention = partial(nn.MultiheadAttention, embedding_dim, num_heads, dropout, batch_first=True)
        feed_forward = partial(PointWiseFeedForward, embedding_dim, dropout, activation, hidden_dim)
        norm = partial(nn.LayerNorm, embedding_dim, eps=LAYER_NORM_EPS)
        blocks = range(num_blocks)
        self.attention_layers = nn.ModuleList(attention() for _ in blocks)
        self.attention_layernorms = nn.ModuleList(norm() for _ in blocks)
        self.forward_layers = nn.ModuleList(feed_forward() for _ in blocks)
        self.forward_layernorms = nn.ModuleList(norm() for _ in blocks)

    def forward(
        self,
        feature_tensors: Mapping[str, Tensor],
        input_embeddings: Tensor,
        padding_mask: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Encode ``[B, N, D]`` to ``[B, N, D]``; padded positions come out finite and without meaning.

        feature_tensors: not read; the argument is part of the protocol of encoders.
        padding_mask: bool ``[B, N]``, True = real event; padded keys are always hidden.
        attention_mask: additive ``[B * H, N, N]`` or ``[B, H, N, N]``.
        """
        x = input_embeddings
        per_head = mask_per_head(attention_mask, x.shape[0], self.num_heads)
        mask = mask_for(x, hide_padded_keys(per_head, padding_mask).flatten(0, 1))
        layers = zip(self.attention_layers, self.attention_layernorms, self.forward_layers, self.forward_layernorms)
        for attention, attention_norm, feed_forward, forward_norm in layers:
            query = attention_norm(x)
            attended, _ = attention(query, x, x, attn_mask=mask, need_weights=False)
            x = feed_forward(forward_norm(query + attended))
        return x


class DiffTransformerBlock(core.DiffTransformerBlock):
    """The block of the DiffTransformer encoder over rectangles: the same weights and numbers, without dropout."""

    attention_class = MultiHeadDifferentialAttention

    def __init__(self, embedding_dim: int, num_heads: int, lambda_init: float, norm: core.NormPlace = "post") -> None:
        super().__init__(embedding_dim, num_heads, lambda_init, norm)

    def forward(  # type: ignore[override]
        self, input_embeddings: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """input_embeddings: ``[B, N, D]``; attention_mask as for the attention. Returns ``[B, N, D]``."""
        return self.residuals(input_embeddings, lambda x: self.attn(x, x, x, attention_mask))


class DiffTransformerLayer(nn.Module):
    """A stack of `DiffTransformerBlock` with lambda_init = 0.8 - 0.6 exp(-0.3 block); no norm after the last."""

    def __init__(self, embedding_dim: int, num_heads: int, num_blocks: int, norm: core.NormPlace = "post") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DiffTransformerBlock(embedding_dim, num_heads, core.lambda_init_of_block(block), norm)
            for block in range(num_blocks)
        )

    def forward(self, input_embeddings: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        for layer in self.layers:
            input_embeddings = layer(input_embeddings, attention_mask)
        return input_embeddings
