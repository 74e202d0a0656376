"""SASRec (arXiv 1808.09781, section III-B and C), in the form of HSTU's public runs and, by options, of RePlay's layer.

A block, over the tokens x of a batch; LN has eps 1e-8, and D is dropout:

    Q = LN(x)                                        the queries are normalised, and so is their residual (III-C)
    S = Q + softmax(Q Wq (x Wk)ᵀ / sqrt(d)) x Wv Wo          self-attention over the past (eq. 2 and 3)
    y = LN(S)
    F = y + D(D(act(y W1 + b1)) W2 + b2)                     point-wise feed-forward (eq. 4)
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from generative_recommenders.config.fields import Share, SmallCount, Width
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.modeling.cache import Appended, KeysValues, softmax_over_cache
from generative_recommenders.modeling.encoders.base import BlockEncoder, check_heads
from generative_recommenders.ops.attention.multi_head import (
    last_token_attention,
    multi_head_attention,
    project_heads,
)
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import feed_forward
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.normalization import LayerNorm

Activation = Literal["relu", "gelu", "silu"]
"""As ``torch.nn.functional`` names them."""


class SasrecBlock(torch.nn.Module):
    """One block of the equations above. norm_weights: layer norms carry weights and biases."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        ffn_hidden_dim: int,
        activation: Activation = "relu",
        dropout_rate: float = 0.0,
        norm_weights: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.num_heads = num_heads
        self.dropout_rate = Dropout(dropout_rate).rate
        self.activation = getattr(F, activation)
        norm = partial(torch.nn.LayerNorm, embedding_dim) if norm_weights else LayerNorm
        self.query_norm = norm(eps=1e-8)
        # One matrix of q, k and v, as in the checkpoints of the published programs.
        self.in_proj = torch.nn.Linear(embedding_dim, 3 * embedding_dim)
        self.out_proj = torch.nn.Linear(embedding_dim, embedding_dim)
        self.ffn_norm = norm(eps=1e-8)
        self.ffn_in = torch.nn.Linear(embedding_dim, ffn_hidden_dim)
        self.ffn_out = torch.nn.Linear(ffn_hidden_dim, embedding_dim)
        for linear in (self.in_proj, self.out_proj, self.ffn_in, self.ffn_out):
            torch.nn.init.xavier_normal_(linear.weight)  # as in the published runs
        torch.nn.init.zeros_(self.in_proj.bias)
        torch.nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x: ``[T, D]``; returns the same shape."""
        query = self.query_norm(x)
        attended = multi_head_attention(
            query, x, self.in_proj, self.out_proj, self.num_heads, layout, self.active_dropout
        )
        # The residual is the normalised query, not x (III-C); keys and values come from x as it is.
        return layout.mask(self.transform(query + attended))

    def transform(self, attended: torch.Tensor) -> torch.Tensor:
        """F of ``S [T, D]``."""
        y = self.ffn_norm(attended)
        return feed_forward(y, self.ffn_in, self.ffn_out, self.activation, self.active_dropout)

    @property
    def active_dropout(self) -> float:
        """The rate now: 0 in evaluation mode."""
        return self.dropout_rate if self.training else 0.0

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H, D / H]`` each."""
        k, v = (project_heads(x, self.in_proj, self.num_heads, part) for part in (1, 2))
        return k, v

    def over_cache(self, x: torch.Tensor, block: KeysValues, appended: Appended) -> torch.Tensor:
        """`forward` of the tokens ``x [T, D]`` alone, over what the block keeps of all."""
        query = self.query_norm(x)
        q = project_heads(query, self.in_proj, self.num_heads, 0)
        attended = softmax_over_cache(q, block, appended).flatten(1)
        return self.transform(query + self.out_proj(attended))

    def over_inputs(self, x: torch.Tensor, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See `BlockEncoder`."""
        query = self.query_norm(x)
        q = project_heads(query, self.in_proj, self.num_heads, 0)
        return self.transform(query + self.out_proj(last_token_attention(q, self.in_proj, inputs, lengths)))


@register_encoder("SASRec", gin_name="sasrec_encoder")
class SASRec(BlockEncoder):
    """SASRec: a stack of `SasrecBlock`, self-attention over the past and a feed-forward network (arXiv 1808.09781, eq.
    2 to 5).

    ``forward(x [T, D], layout, events) -> [T, D]``, in x's float dtype. ValueError where num_heads does not divide D.

    ffn_hidden_dim: hidden width of the feed-forward.
    ffn_activation_fn: its activation.
    ffn_dropout_rate: dropout on the attention's weights and within the feed-forward.
    norm_weights: layer norms carry weights and biases.
    final_norm: layer norm with weights after the last block (RePlay's body).
    """

    def __init__(
        self,
        embedding_dim: int,
        num_blocks: SmallCount = 2,
        num_heads: SmallCount = 1,
        ffn_hidden_dim: Width = 64,
        ffn_activation_fn: Activation = "relu",
        ffn_dropout_rate: Share = 0.2,
        norm_weights: bool = False,
        final_norm: bool = False,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.blocks = torch.nn.ModuleList(
            SasrecBlock(embedding_dim, num_heads, ffn_hidden_dim, ffn_activation_fn, ffn_dropout_rate, norm_weights)
            for _ in range(num_blocks)
        )
        self.final_norm = torch.nn.LayerNorm(embedding_dim) if final_norm else torch.nn.Identity()

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_norm(x)
