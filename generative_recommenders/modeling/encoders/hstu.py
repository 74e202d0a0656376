"""HSTU (arXiv 2402.17152, section 3.2), in the public research form.

A block, over the tokens x of a batch; act is SiLU, LN has eps 1e-6, and N is the constant max_length, or by
``attn_divisor = "length"`` the number of tokens that the position attends to:

    U, V, Q, K = split(act(LN(x) W))             (eq. 1)
    A V = SiLU(Q Kᵀ + bias) / N V                (eq. 2), over the past; bias: see `ops.attention.relative_bias`
    x = x + W_o dropout(LN(A V) * U) + b_o       (eq. 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from generative_recommenders.config.fields import Share, SmallCount, Width
from generative_recommenders.config.registry import register_encoder
from generative_recommenders.config.sections import NextTime
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import Appended, KeysValues, pointwise_over_cache
from generative_recommenders.modeling.encoders.base import (
    LINEAR_ACTIVATIONS,
    LinearActivation,
    LinearConfig,
    TimedEncoder,
)
from generative_recommenders.ops.attention.pointwise import pointwise_attention
from generative_recommenders.ops.attention.relative_bias import (
    BatchInputs,
    BiasInputs,
    RelativeBias,
    bias_inputs,
    softmax_over_all_columns,
)
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.layout import Layout, attended_tokens
from generative_recommenders.ops.normalization import layer_norm

Normalization = Literal["rel_bias", "softmax_rel_bias"]
Divisor = Literal["max_length", "length"]


class HstuBlock(torch.nn.Module):
    """One block of the equations above.

    normalization: "rel_bias", or "softmax_rel_bias" for `softmax_over_all_columns` in place of eq. 2. concat_ua: the
    output projection takes ``[U, LN(A V), U * LN(A V)]``.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dqk: int,
        dv: int,
        max_length: int,
        normalization: Normalization = "rel_bias",
        linear_activation: LinearActivation = "silu",
        linear_dropout_rate: float = 0.0,
        attn_dropout_rate: float = 0.0,
        concat_ua: bool = False,
        bias: RelativeBias | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.normalization = normalization
        self.attn_dropout_rate = Dropout(attn_dropout_rate).rate
        self.concat_ua = concat_ua
        self.bias = bias
        self.activation = LINEAR_ACTIVATIONS[linear_activation]
        self.widths = {"u": num_heads * dv, "v": num_heads * dv, "q": num_heads * dqk, "k": num_heads * dqk}
        # One matrix of U, V, Q and K, as in the checkpoints of the published program.
        self.uvqk = torch.nn.Parameter(torch.empty(embedding_dim, sum(self.widths.values())).normal_(std=0.02))
        self.output = torch.nn.Linear(num_heads * dv * (3 if concat_ua else 1), embedding_dim)
        torch.nn.init.xavier_uniform_(self.output.weight)
        self.dropout = Dropout(linear_dropout_rate)

    def forward(
        self, x: torch.Tensor, layout: Layout, inputs: BatchInputs, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: ``[T, D]``; inputs: see `bias_inputs`; scale: ``[T]``, of the attention's output, see `HSTU.scale`."""
        u, v, q, k = self.project(x)
        return layout.mask(self.combine(x, u, self.attention(q, k, v, layout, inputs), scale))

    def project(self, x: torch.Tensor, names: str = "uvqk") -> tuple[torch.Tensor, ...]:
        """Eq. 1, or those of U, V, Q and K that are named: ``[T, H, dv]`` and ``[T, H, dqk]``."""
        normed, widths = layer_norm(x, eps=1e-6), [*self.widths.values()]
        parts: Sequence[torch.Tensor]
        if names == "uvqk":
            parts = self.activation(normed @ self.uvqk).split(widths, dim=-1)
        else:  # no product of what is never read, and no copy of the weights
            weights = dict(zip("uvqk", self.uvqk.split(widths, dim=1)))
            parts = [self.activation(normed @ weights[name]) for name in names]
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in parts)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, inputs: BatchInputs
    ) -> torch.Tensor:
        """Eq. 2, ``[T, H, dv]``."""
        rate = self.attn_dropout_rate if self.training else 0.0
        if self.normalization == "rel_bias":
            bias = None if self.bias is None else self.bias.tables(inputs)
            return pointwise_attention(q, k, v, layout, bias, float(self.max_length), rate)
        biases = None if self.bias is None else [self.bias(each) for each in inputs]
        return softmax_over_all_columns(q, k, v, layout, biases, self.max_length, rate)

    def combine(
        self, x: torch.Tensor, u: torch.Tensor, attended: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Eq. 3. x: ``[T, D]``; u, attended: ``[T, H, dv]``."""
        if scale is not None:
            attended = attended * scale[:, None, None]
        # Brings sums over few and over many tokens to one scale, which a softmax has from the start.
        a = layer_norm(attended.flatten(1), eps=1e-6)
        u = u.flatten(1)
        gated = torch.cat([u, a, u * a], dim=-1) if self.concat_ua else u * a
        return self.output(self.dropout(gated)) + x

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k ``[T, H, dqk]`` and v ``[T, H, dv]``."""
        k, v = self.project(x, "kv")
        return k, v

    def over_cache(
        self,
        x: torch.Tensor,
        block: KeysValues,
        appended: Appended,
        inputs: BiasInputs,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` of the tokens ``x [T, D]`` alone, over what the block keeps of all; "rel_bias" only."""
        u, q = self.project(x, "uq")
        bias = None if self.bias is None else self.bias(inputs)
        attended = pointwise_over_cache(q, block, appended, bias, float(self.max_length))
        return self.combine(x, u, attended, scale)


@register_encoder("HSTU", gin_name="hstu_encoder")
class HSTU(TimedEncoder):
    """HSTU: a stack of `HstuBlock`, pointwise attention with a relative bias and a gate (arXiv 2402.17152, eq. 1 to 3).

    ``forward(x [T, D], layout, events) -> [T, D]``; events may hold ``timestamps`` and ``next_timestamps [T]`` int64,
    seconds.

    max_length: N = max_sequence_length + gr_output_length + 1, the constant divisor and the reach of the position bias.
    dqk: width of a head's queries and keys.
    dv: width of a head's values and gates.
    normalization: "rel_bias" as published, or a softmax over all N columns in place of SiLU.
    linear_config: accepted as published; there is one projection to U, V, Q and K.
    linear_activation: activation after that projection.
    linear_dropout_rate: dropout before the output projection.
    attn_dropout_rate: dropout on the attention's weights; the published code reads the rate and drops none.
    concat_ua: the output projection takes ``[U, LN(A V), U * LN(A V)]`` instead of the product alone.
    enable_relative_attention_bias: False leaves out both parts of the bias.
    enable_relative_time_bias: False leaves out the bias by the time between two events.
    enable_relative_position_bias: False leaves out the bias by the distance of two positions.
    attn_divisor: "max_length" divides by N as published, "length" by the tokens attended to, so that the sums of short
    histories are no smaller than those of long ones.
    next_time: "given": the time bias of a position may use the time of the event it predicts, in training and
    evaluation; "hidden": it uses the position's own time.
    """

    time_options = ("enable_relative_attention_bias", "enable_relative_time_bias")
    """Options that must all be on for times to be read."""
    redraws_inputs = True
    """The published HSTU draws its input preprocessor's matrices anew, by Xavier's normal distribution."""

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
        concat_ua: bool = False,
        enable_relative_attention_bias: bool = True,
        enable_relative_time_bias: bool = True,
        enable_relative_position_bias: bool = True,
        attn_divisor: Divisor = "max_length",
        next_time: NextTime = "given",
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.output_dim = embedding_dim
        self.activation_checkpoint = activation_checkpoint
        self.max_length, self.head_width = max_length, max(dqk, dv)
        self.timed = enable_relative_attention_bias and enable_relative_time_bias
        self.next_time = next_time
        self.causal = normalization == "rel_bias"
        if attn_divisor == "length" and not self.causal:
            raise ValueError('attn_divisor "length" acts with normalization "rel_bias" alone')
        self.attn_divisor = attn_divisor
        self.blocks = torch.nn.ModuleList(
            HstuBlock(
                embedding_dim, num_heads, dqk, dv, max_length, normalization, linear_activation,
                linear_dropout_rate, attn_dropout_rate, concat_ua,
                RelativeBias(max_length, enable_relative_position_bias) if enable_relative_attention_bias else None,
            )
            for _ in range(num_blocks)
        )  # fmt: skip

    def inputs(self, layout: Layout, events: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        bias: BatchInputs = []
        if self.blocks[0].bias is not None:
            times = self.times(events)
            bias = bias_inputs(layout, self.max_length, times, whole=not self.causal, head_width=self.head_width)
        return bias, self.scale(layout)

    def cached_inputs(self, events: Mapping[str, torch.Tensor], appended: Appended) -> tuple[Any, ...]:
        if not self.causal:
            raise UserError(
                'encode_incremental: the normaliser of "softmax_rel_bias" runs over later items too, so nothing can be '
                'kept; choose hstu_encoder.normalization "rel_bias"'
            )
        return self.appended_bias(events, appended), self.scale(appended.layout)

    def scale(self, layout: Layout) -> torch.Tensor | None:
        """``[T]`` float32: N over the number of tokens that each one attends to; None where N divides."""
        return None if self.attn_divisor == "max_length" else self.max_length / attended_tokens(layout)
