"""RePlay's differential attention (arXiv 2410.05258) over padded rectangles, with a dense mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.compat.replay.nn.mask import additive_mask, causal_mask, mask_for, mask_per_head
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.diff_transformer import DifferentialAttention

__all__ = ["MultiHeadDifferentialAttention"]


class MultiHeadDifferentialAttention(DifferentialAttention):
    """Differential attention of queries, keys and values ``[B, N, D]`` under a dense mask."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, N, D]`` each to ``[B, N, D]``; attn_mask: additive ``[B * H, N, N]`` or ``[B, H, N, N]``, causal by
        default."""
        if attn_mask is not None:
            mask = mask_per_head(attn_mask, query.shape[0], self.num_heads)
        elif query.shape[1] == key.shape[1]:
            mask = additive_mask(causal_mask(query.shape[1], query.device))
        else:
            raise UserError(
                f"{query.shape[1]} queries and {key.shape[1]} keys in MultiHeadDifferentialAttention: "
                "the causal mask needs equal lengths, pass attn_mask"
            )
        q, k, v = (x.transpose(-2, -3) for x in self.project(query, key, value))
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        mask = mask_for(q1, mask)
        first = F.scaled_dot_product_attention(q1, k1, v, mask)
        second = F.scaled_dot_product_attention(q2, k2, v, mask)
        return self.combine(first.transpose(-2, -3), second.transpose(-2, -3))
