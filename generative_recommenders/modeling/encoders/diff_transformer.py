"""DiffTransformer (arXiv 2410.05258): two softmax attentions over shared values, one subtracted from the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn

from generative_recommenders.config.fields import Share, SmallCount
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import Appended, KeysValues, softmax_over_cache
from generative_recommenders.modeling.encoders.base import BlockEncoder, check_heads
from generative_recommenders.ops.attention.differential import differential_self_attention
from generative_recommenders.ops.attention.multi_head import values_over_inputs, weights_over_inputs
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import FLOAT32_EPS, SwiGLU
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.normalization import RMSNorm, rms_norm

NormPlace = Literal["post", "pre"]
HEAD_NORM_EPS = 1e-5
_LAMBDA_STD = 0.1  # of the lambda vectors at the start, as in the public code of the paper's authors


def lambda_init_of_block(block: int) -> float:
    """0.8 - 0.6 exp(-0.3 block), blocks counted from 0 (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)


class DifferentialAttention(nn.Module):
    """(softmax(q1 k1ᵀ / sqrt(dq)) - lambda softmax(q2 k2ᵀ / sqrt(dq))) v per head, without the attentions themselves.

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
                raise UserError(f"differential attention: {name} {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.lambda_init = lambda_init
        head_width = kdim // num_heads
        self.W_q = nn.Linear(embedding_dim, 2 * kdim, bias=bias)
        self.W_k = nn.Linear(embedding_dim, 2 * kdim, bias=bias)
        self.W_v = nn.Linear(embedding_dim, vdim, bias=bias)
        self.W_o = nn.Linear(vdim, embedding_dim, bias=bias)
        vectors = (nn.Parameter(torch.randn(num_heads, head_width) * _LAMBDA_STD) for _ in range(4))
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = vectors
        self.rms_scale = nn.Parameter(torch.ones(vdim // num_heads))

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[..., D]`` each to heads: q and k ``[..., H, 2 dq]``, both attentions side by side, and v."""
        projected = self.W_q(query), self.W_k(key), self.W_v(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        return q, k, v

    def combine(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The two attended values ``[..., H, dv]`` to ``[..., D]``."""
        return self.output(first - self.lambdas().unsqueeze(-1) * second)

    def output(self, difference: torch.Tensor) -> torch.Tensor:
        """The difference of attended values ``[..., H, dv]`` to ``[..., D]``: norm per head, output projection (eq.
        3)."""
        # (1 - lambda_init) keeps the gradient flow of a Transformer, whatever the block (section 2.1).
        normed = rms_norm(difference, self.rms_scale * (1.0 - self.lambda_init), HEAD_NORM_EPS)
        return self.W_o(normed.flatten(-2))

    def lambdas(self) -> torch.Tensor:
        """``[H]``: the share of the second attention that is subtracted (eq. 2)."""
        first = (self.lambda_q1 * self.lambda_k1).sum(-1).exp()
        second = (self.lambda_q2 * self.lambda_k2).sum(-1).exp()
        return first - second + self.lambda_init


class DiffTransformerBlock(nn.Module):
    """Differential attention, then SwiGLU, each with a residual and an RMS norm; vdim and SwiGLU's width are
    2 D.

    norm: "post" norms after the residual, y = RMS(A(x) + x), out = RMS(S(y) + y) (RePlay's form); "pre"
    norms each branch's input, y = x + A(RMS(x)), out = y + S(RMS(y)) (arXiv 2410.05258, eq. 4 and 5).
    dropout_rate: on the probabilities of both attentions and on what each branch adds to its residual.
    """

    attention_class: type[DifferentialAttention] = DifferentialAttention

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        lambda_init: float,
        norm: NormPlace = "post",
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in (places := get_args(NormPlace)):
            raise UserError(f"norm {norm!r} of DiffTransformerBlock: choose one of {', '.join(places)}")
        self.norm = norm
        self.attn_norm = RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.attn = self.attention_class(embedding_dim, num_heads, lambda_init, vdim=2 * embedding_dim)
        self.ff_norm = RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.ff = SwiGLU(embedding_dim, 2 * embedding_dim)
        self.dropout = Dropout(dropout_rate)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x: ``[T, D]``; returns the same shape."""
        return layout.mask(self.residuals(x, partial(self.attend, layout=layout)))

    def residuals(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``; `attend` applies the attention mask."""
        if self.norm == "pre":
            x = x + attend(self.attn_norm(x))
            return x + self.dropout(self.ff(self.ff_norm(x)))
        x = self.attn_norm(x + attend(x))
        return self.ff_norm(x + self.dropout(self.ff(x)))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k1 and k2 side by side ``[T, H, 2 dq]``, and the values ``[T, H, dv]``."""
        heads = self.attn.num_heads
        x = self.attn_norm(x) if self.norm == "pre" else x
        return self.attn.W_k(x).unflatten(-1, (heads, -1)), self.attn.W_v(x).unflatten(-1, (heads, -1))

    def over_cache(self, x: torch.Tensor, block: KeysValues, appended: Appended) -> torch.Tensor:
        """`forward` of the tokens ``x [T, D]`` alone, over what the block keeps of all."""

        def attend(x: torch.Tensor) -> torch.Tensor:
            q = self.attn.W_q(x).unflatten(-1, (self.attn.num_heads, -1))
            halves = zip(q.chunk(2, -1), block.keys.chunk(2, -1))
            first, second = (softmax_over_cache(q, KeysValues(k, block.values), appended) for q, k in halves)
            return self.attn.combine(first, second)

        return self.residuals(x, attend)

    def over_inputs(self, x: torch.Tensor, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See `BlockEncoder`."""
        attn, inputs = self.attn, self.attn_norm(inputs) if self.norm == "pre" else inputs

        def attend(x: torch.Tensor) -> torch.Tensor:
            q = attn.W_q(x).unflatten(-1, (2 * attn.num_heads, -1))
            first, second = weights_over_inputs(q, attn.W_k.weight, inputs, lengths).unflatten(1, (-1, 2)).unbind(2)
            return attn.output(values_over_inputs(first - attn.lambdas()[:, None] * second, inputs, attn.W_v.weight))

        return self.residuals(x, attend)

    def attend(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(softmax(q1 k1ᵀ / sqrt(dq)) - lambda softmax(q2 k2ᵀ / sqrt(dq))) v, ``[T, D]`` (eq. 1)."""
        attn, rate = self.attn, self.dropout.rate if self.training else 0.0
        weights = attn.W_q.weight, attn.W_k.weight, attn.W_v.weight
        return self.dropout(attn.output(differential_self_attention(x, *weights, attn.lambdas(), layout, rate)))


@register_encoder("DiffTransformer", gin_name="diff_transformer_encoder")
class DiffTransformer(BlockEncoder):
    """DiffTransformer: a stack of `DiffTransformerBlock`, one softmax attention less a share of another (arXiv
    2410.05258).

    ``forward(x [T, D], layout, events) -> [T, D]``, in x's float dtype; no norm after the last block, whose lambda_init
    is 0.8 - 0.6 exp(-0.3 block). ValueError where num_heads does not divide D.

    norm: "post" norms after the residual (RePlay's form), "pre" each branch's input (the paper's).
    dropout_rate: dropout on the probabilities of both attentions and on what each branch adds.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_blocks: SmallCount = 2,
        num_heads: SmallCount = 1,
        norm: NormPlace = "post",
        dropout_rate: Share = 0.0,
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.layers = torch.nn.ModuleList(
            DiffTransformerBlock(embedding_dim, num_heads, lambda_init_of_block(block), norm, dropout_rate)
            for block in range(num_blocks)
        )

    @property
    def blocks(self) -> torch.nn.ModuleList:  # type: ignore[override]
        """By the name that `BlockEncoder` knows; checkpoints call them layers."""
        return self.layers
