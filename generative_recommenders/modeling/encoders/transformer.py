"""The plain Transformer encoder (arXiv 1706.03762) over a layout: causal, or as the layout's visibility
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from generative_recommenders.config.registry import register_encoder
from generative_recommenders.modeling.encoders.checks import check_heads, check_positive
from generative_recommenders.modeling.transformer import PositionalEncoding, TransformerBlock
from generative_recommenders.ops.attention import softmax_attention
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.recomputation import run_block


@register_encoder("Transformer", gin_name="transformer_encoder")
class Transformer(torch.nn.Module):
    """Sinusoidal positions and post-norm `TransformerBlock`s. The preprocessor's learned positions come on
    top.

    max_length: rows of the position table.
    """

    causal = True

    def __init__(
        self,
        embedding_dim: int,
        max_length: int,
        num_blocks: int = 2,
        num_heads: int = 1,
        ffn_hidden_dim: int = 64,
        dropout_rate: float = 0.1,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        check_positive(num_blocks=num_blocks, ffn_hidden_dim=ffn_hidden_dim)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.positions = PositionalEncoding(embedding_dim, max_length)
        self.dropout = Dropout(dropout_rate)
        self.blocks = torch.nn.ModuleList(
            TransformerBlock(embedding_dim, num_heads, ffn_hidden_dim, dropout_rate)
            for _ in range(num_blocks)
        )

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events are not used."""
        x = self.dropout(x + self.positions.pe[0].index_select(0, layout.positions))
        rate = self.dropout.rate if self.training else 0.0
        attend = partial(softmax_attention, layout=layout, dropout_rate=rate)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpoint and self.training, x, attend)
        return layout.mask(x)
