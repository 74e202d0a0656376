"""FuXi-alpha (arXiv 2502.03036), in the form of the authors' public runs.

A block, over the tokens x of a batch; act is SiLU, RMS has eps 1e-6 and no weights, D is dropout, N is the constant
max_length:

    U, V, Q, K = split(act(RMS(x) W))
    H = [A_position V, A_time V, SiLU(Q Kᵀ) / N V]            adaptive multi-channel self-attention, over the past
    o = x + W_0 D(RMS(H) * U) + b_0                           multi-stage feed-forward network, first stage
    x = o + W_2 (SiLU(W_g n) * W_1 n),  n = D(RMS(o))         and its second stage

A_position[i, j] is a weight for j - i and A_time[i, j] one for the bucket of the time between the two
(`ops.attention.tables`): content, position and time have channels of their own, where HSTU adds position and time to
the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le

from generative_recommenders.config.fields import Share, SmallCount, Width
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.config.sections import NextTime
from generative_recommenders.modeling.cache import Appended, KeysValues, pointwise_over_cache
from generative_recommenders.modeling.encoders.base import (
    LINEAR_ACTIVATIONS,
    LinearActivation,
    LinearConfig,
    TimedEncoder,
)
from generative_recommenders.ops.attention.pointwise import pointwise_attention
from generative_recommenders.ops.attention.relative_bias import BatchInputs, BiasInputs, RelativeBias, bias_inputs
from generative_recommenders.ops.attention.tables import table_attention
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import SwiGLU
from generative_recommenders.ops.layout import Layout

CHANNELS = 3
Normalization = Literal["rel_bias"]


class FuxiBlock(torch.nn.Module):
    """One block of the equations above. ffn_hidden_dim: of its second stage, 0 for a block without it."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dqk: int,
        dv: int,
        max_length: int,
        ffn_hidden_dim: int,
        linear_activation: LinearActivation = "silu",
        linear_dropout_rate: float = 0.0,
        attn_dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.attn_dropout_rate = Dropout(attn_dropout_rate).rate
        self.widths = [num_heads * width for width in (CHANNELS * dv, dv, dqk, dqk)]  # of U, V, Q and K in one matrix
        self.activation = LINEAR_ACTIVATIONS[linear_activation]
        self.uvqk = torch.nn.Parameter(torch.empty(embedding_dim, sum(self.widths)).normal_(std=0.02))
        self.channels = RelativeBias(max_length)
        self.output = torch.nn.Linear(CHANNELS * num_heads * dv, embedding_dim)
        self.feed_forward = SwiGLU(embedding_dim, ffn_hidden_dim, bias=False) if ffn_hidden_dim else None
        for linear in (each for each in self.modules() if isinstance(each, torch.nn.Linear)):
            torch.nn.init.xavier_uniform_(linear.weight)
        self.dropout = Dropout(linear_dropout_rate)

    def forward(self, x: torch.Tensor, layout: Layout, inputs: BatchInputs) -> torch.Tensor:
        """x: ``[T, D]``; inputs: see `bias_inputs`."""
        u, q, k, v = self.project(x)
        rate = self.attn_dropout_rate if self.training else 0.0
        semantic = pointwise_attention(q, k, v, layout, None, float(self.max_length), rate)
        relative = table_attention(v, layout, self.channels.tables(inputs))
        return layout.mask(self.combine(x, u, [*relative, semantic]))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Projections: u ``[T, 3 H dv]``; q, k ``[T, H, dqk]``; v ``[T, H, dv]``."""
        projected = self.activation(F.rms_norm(x, x.shape[-1:], eps=1e-6) @ self.uvqk)
        u, v, q, k = projected.split(self.widths, dim=-1)
        return u, *(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))

    def combine(self, x: torch.Tensor, u: torch.Tensor, attended: Sequence[torch.Tensor]) -> torch.Tensor:
        """The two stages of the feed-forward. x: ``[T, D]``; u: ``[T, 3 H dv]``; attended: ``[T, H, dv]`` by
        position, by time unless that is unknown, and by content."""
        if len(attended) < CHANNELS:  # events without times
            attended = [attended[0], torch.zeros_like(attended[0]), attended[1]]
        h = torch.cat(tuple(attended), dim=-1).flatten(1)  # head by head
        o = x + self.output(self.dropout(F.rms_norm(h, h.shape[-1:], eps=1e-6) * u))
        if self.feed_forward is None:
            return o
        return o + self.feed_forward(self.dropout(F.rms_norm(o, o.shape[-1:], eps=1e-6)))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k ``[T, H, dqk]`` and v ``[T, H, dv]``."""
        _, _, k, v = self.project(x)
        return k, v

    def over_cache(self, x: torch.Tensor, block: KeysValues, appended: Appended, inputs: BiasInputs) -> torch.Tensor:
        """`forward` of the tokens ``x [T, D]`` alone, over what the block keeps of all."""
        u, q, _, v = self.project(x)
        sees, values = appended.distances() <= 0, block.values.flatten(2)
        attended = [
            appended.layout.flatten(table[index] * sees @ values).view_as(v)
            for table, index in zip((self.channels.position, self.channels.time), inputs)
            if index is not None
        ]
        semantic = pointwise_over_cache(q, block, appended, None, float(self.max_length))
        return self.combine(x, u, [*attended, semantic])


@register_encoder("FuXi", gin_name="fuxi_encoder")
class FuXi(TimedEncoder):
    """FuXi-alpha: a stack of `FuxiBlock`, three channels of attention and a feed-forward in two stages (arXiv
    2502.03036).

    ``forward(x [T, D], layout, events) -> [T, D]``; events may hold ``timestamps`` and ``next_timestamps [T]`` int64,
    seconds.

    max_length: N = max_sequence_length + gr_output_length + 1, the constant divisor and the longest distance of the
    positional channel.
    dqk: width of a head's queries and keys.
    dv: width of a head's values, in each channel.
    normalization: accepted as published.
    linear_config: accepted as published; there is one projection to U, V, Q and K.
    linear_activation: activation after that projection.
    linear_dropout_rate: dropout before both stages of the feed-forward.
    attn_dropout_rate: dropout on the semantic channel (the authors' code takes it and drops nothing).
    ffn_multiply: hidden width of the second stage over D.
    ffn_single_stage: blocks without the second stage.
    enable_relative_time_bias: False leaves out the temporal channel.
    next_time: "given": the temporal channel may use the time of the event that a position predicts; "hidden": it uses
    the position's own time.
    """

    time_options = ("enable_relative_time_bias",)
    redraws_inputs = True

    def __init__(
        self,
        embedding_dim: int,
        max_length: int,
        num_blocks: SmallCount = 2,
        num_heads: SmallCount = 1,
        dqk: Width = 64,
        dv: Width = 64,
        normalization: Normalization = "rel_bias",
        linear_config: LinearConfig = "uvqk",
        linear_activation: LinearActivation = "silu",
        linear_dropout_rate: Share = 0.0,
        attn_dropout_rate: Share = 0.0,
        ffn_multiply: Annotated[float, Gt(0.0), Le(64.0)] = 1.0,
        ffn_single_stage: bool = False,
        enable_relative_time_bias: bool = True,
        next_time: NextTime = "given",
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.max_length = max_length
        self.timed = enable_relative_time_bias
        self.next_time = next_time
        hidden = 0 if ffn_single_stage else max(1, int(embedding_dim * ffn_multiply))
        self.blocks = torch.nn.ModuleList(
            FuxiBlock(
                embedding_dim, num_heads, dqk, dv, max_length, hidden, linear_activation,
                linear_dropout_rate, attn_dropout_rate,
            )
            for _ in range(num_blocks)
        )  # fmt: skip

    def inputs(self, layout: Layout, events: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        return (bias_inputs(layout, self.max_length, self.times(events)),)

    def cached_inputs(self, events: Mapping[str, torch.Tensor], appended: Appended) -> tuple[Any, ...]:
        return (self.appended_bias(events, appended),)
