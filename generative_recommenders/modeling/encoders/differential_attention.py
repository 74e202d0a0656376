"""Differential attention and its Transformer block (arXiv 2410.05258), in their dense public form.

`MultiHeadDifferentialAttention.project` and `.combine` hold all that is not attention itself and act on any
leading axes, so that a jagged encoder runs two fused attentions over shared values between them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from generative_recommenders.compat.replay.attention_masks import (
    additive_mask,
    causal_mask,
    mask_for,
    mask_per_head,
)
from generative_recommenders.errors import UserError
from generative_recommenders.ops.feed_forward import FLOAT32_EPS, SwiGLU

HEAD_NORM_EPS = 1e-5
_LAMBDA_STD = 0.1  # of the lambda vectors at the start, as in the public code of the paper's authors


class DifferentialHeads(NamedTuple):
    """Two pairs of queries and keys ``[..., H, dq]`` over shared values ``[..., H, dv]``."""

    q1: torch.Tensor
    k1: torch.Tensor
    q2: torch.Tensor
    k2: torch.Tensor
    v: torch.Tensor


def lambda_init_of_block(block: int) -> float:
    """0.8 - 0.6 exp(-0.3 block), blocks counted from 0 (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)


class MultiHeadDifferentialAttention(nn.Module):
    """(softmax(q1 k1ᵀ / sqrt(dq)) - lambda softmax(q2 k2ᵀ / sqrt(dq))) v per head (arXiv 2410.05258).

    Equations 1 to 3: lambda = exp(lq1·lk1) - exp(lq2·lk2) + lambda_init per head. Each head's output is
    RMS-normed, scaled by a weight that the heads share and by (1 - lambda_init); the heads are concatenated
    and projected back to D.

    embedding_dim: width D; must be divisible by num_heads.
    lambda_init: the constant part of lambda.
    bias: biases in the four projections.
    kdim: width of q1, q2, k1, k2 over all heads (dq = kdim / H), D unless given.
    vdim: width of the values over all heads (dv = vdim / H), D unless given.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        lambda_init: float,
        bias: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
    ) -> None:
        super().__init__()
        kdim, vdim = kdim or embedding_dim, vdim or embedding_dim
        for name, width in (("embedding_dim", embedding_dim), ("kdim", kdim), ("vdim", vdim)):
            if num_heads < 1 or width % num_heads:
                raise UserError(
                    f"differential attention: {name} {width} is not divisible by num_heads {num_heads}"
                )
        self.num_heads = num_heads
        self.lambda_init = lambda_init
        head_width = kdim // num_heads
        self.W_q = nn.Linear(embedding_dim, 2 * kdim, bias=bias)
        self.W_k = nn.Linear(embedding_dim, 2 * kdim, bias=bias)
        self.W_v = nn.Linear(embedding_dim, vdim, bias=bias)
        self.W_o = nn.Linear(vdim, embedding_dim, bias=bias)
        self.lambda_q1 = _lambda_vectors(num_heads, head_width)
        self.lambda_k1 = _lambda_vectors(num_heads, head_width)
        self.lambda_q2 = _lambda_vectors(num_heads, head_width)
        self.lambda_k2 = _lambda_vectors(num_heads, head_width)
        self.rms_scale = nn.Parameter(torch.ones(vdim // num_heads))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, key, value: ``[B, N, D]``; attn_mask: additive ``[B * H, N, N]`` or ``[B, H, N, N]``, causal
        unless given.

        Returns ``[B, N, D]``.
        """
        q1, k1, q2, k2, v = (x.transpose(-2, -3) for x in self.project(query, key, value))
        mask = mask_for(q1, self._mask(attn_mask, query, key))
        first = F.scaled_dot_product_attention(q1, k1, v, mask)
        second = F.scaled_dot_product_attention(q2, k2, v, mask)
        return self.combine(first.transpose(-2, -3), second.transpose(-2, -3))

    def project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> DifferentialHeads:
        """``[..., D]`` each to heads; every head's 2 dq columns hold its first half, then its second."""
        q1, q2 = self.W_q(query).unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        k1, k2 = self.W_k(key).unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        v = self.W_v(value).unflatten(-1, (self.num_heads, -1))
        return DifferentialHeads(q1, k1, q2, k2, v)

    def combine(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The two attended values ``[..., H, dv]`` to ``[..., D]``: difference, norm per head, output
        projection."""
        difference = first - self.lambdas().unsqueeze(-1) * second
        normed = F.rms_norm(difference, difference.shape[-1:], eps=HEAD_NORM_EPS) * self.rms_scale
        return self.W_o((normed * (1.0 - self.lambda_init)).flatten(-2))

    def lambdas(self) -> torch.Tensor:
        """``[H]``: how much of the second attention is taken off (eq. 2)."""
        first = (self.lambda_q1 * self.lambda_k1).sum(-1).exp()
        second = (self.lambda_q2 * self.lambda_k2).sum(-1).exp()
        return first - second + self.lambda_init

    def _mask(self, attn_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if attn_mask is not None:
            return mask_per_head(attn_mask, query.shape[0], self.num_heads)
        if query.shape[1] != key.shape[1]:
            raise UserError(
                f"{query.shape[1]} queries and {key.shape[1]} keys in MultiHeadDifferentialAttention: "
                "the causal mask needs equal lengths, pass attn_mask"
            )
        return additive_mask(causal_mask(query.shape[1], query.device))


class DiffTransformerBlock(nn.Module):
    """Differential attention, then SwiGLU, each with a residual and an RMS norm; vdim and SwiGLU's width are
    2 D.

    norm: "post" norms behind the residual, y = RMS(A(x) + x), out = RMS(S(y) + y) (RePlay's form); "pre"
    norms each branch's input, y = x + A(RMS(x)), out = y + S(RMS(y)) (arXiv 2410.05258, eq. 4 and 5).
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, lambda_init: float, norm: Literal["post", "pre"] = "post"
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise UserError(f"norm {norm!r} of DiffTransformerBlock: choose 'post' or 'pre'")
        self.norm = norm
        self.attn_norm = nn.RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.attn = MultiHeadDifferentialAttention(
            embedding_dim, num_heads, lambda_init, vdim=2 * embedding_dim
        )
        self.ff_norm = nn.RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.ff = SwiGLU(embedding_dim, 2 * embedding_dim)

    def forward(
        self, input_embeddings: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_embeddings: ``[B, N, D]``; attention_mask as for the attention. Returns ``[B, N, D]``."""
        x = input_embeddings
        if self.norm == "pre":
            normed = self.attn_norm(x)
            x = x + self.attn(normed, normed, normed, attention_mask)
            return x + self.ff(self.ff_norm(x))
        x = self.attn_norm(self.attn(x, x, x, attention_mask) + x)
        return self.ff_norm(self.ff(x) + x)


class DiffTransformerLayer(nn.Module):
    """A stack of `DiffTransformerBlock` with lambda_init = 0.8 - 0.6 exp(-0.3 block); no norm behind the
    last."""

    def __init__(
        self, embedding_dim: int, num_heads: int, num_blocks: int, norm: Literal["post", "pre"] = "post"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DiffTransformerBlock(embedding_dim, num_heads, lambda_init_of_block(block), norm)
            for block in range(num_blocks)
        )

    def forward(
        self, input_embeddings: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        for layer in self.layers:
            input_embeddings = layer(input_embeddings, attention_mask)
        return input_embeddings


def _lambda_vectors(num_heads: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_heads, width) * _LAMBDA_STD)
