"""RePlay's differential Transformer (arXiv 2410.05258) over padded rectangles, with dense masks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from generative_recommenders.compat.replay.nn.attention import MultiHeadDifferentialAttention
from generative_recommenders.modeling.encoders import diff_transformer as core


class DiffTransformerBlock(core.DiffTransformerBlock):
    """The block of the DiffTransformer encoder over rectangles: the same weights and numbers, without dropout."""

    attention_class = MultiHeadDifferentialAttention

    def __init__(
        self, embedding_dim: int, num_heads: int, lambda_init: float, norm: Literal["post", "pre"] = "post"
    ) -> None:
        super().__init__(embedding_dim, num_heads, lambda_init, norm)

    def forward(  # type: ignore[override]
        self, input_embeddings: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_embeddings: ``[B, N, D]``; attention_mask as for the attention. Returns ``[B, N, D]``."""
        return self.residuals(input_embeddings, lambda x: self.attn(x, x, x, attention_mask))


class DiffTransformerLayer(nn.Module):
    """A stack of `DiffTransformerBlock` with lambda_init = 0.8 - 0.6 exp(-0.3 block); no norm behind the last."""

    def __init__(
        self, embedding_dim: int, num_heads: int, num_blocks: int, norm: Literal["post", "pre"] = "post"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DiffTransformerBlock(embedding_dim, num_heads, core.lambda_init_of_block(block), norm)
            for block in range(num_blocks)
        )

    def forward(
        self, input_embeddings: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        for layer in self.layers:
            input_embeddings = layer(input_embeddings, attention_mask)
        return input_embeddings
