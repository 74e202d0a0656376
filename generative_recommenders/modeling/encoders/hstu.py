"""HSTU, the public research form (arXiv 2402.17152, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from generative_recommenders.config.registry import register_encoder
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.cache import Appended, KeysValues, pointwise_over_cache
from generative_recommenders.modeling.encoders.sasrec import check_positive, run_block
from generative_recommenders.ops.attention import TableBias, looked_up, pointwise_attention, tiles
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.layout import Layout
from generative_recommenders.ops.normalization import layer_norm

NORMALIZATIONS = ("rel_bias", "softmax_rel_bias")
NEXT_TIMES = ("given", "hidden")
LINEAR_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "none": lambda x: x}
NUM_TIME_BUCKETS = 128
BUCKET_WIDTH = 0.301


def time_buckets(query_times: torch.Tensor, key_times: torch.Tensor) -> torch.Tensor:
    """``[g, n, c]`` int64: trunc(ln(max(|t_query - t_key|, 1)) / 0.301), limited to 0..128.

    query_times ``[g, n]``, key_times ``[g, c]``: int64 seconds.
    """
    difference = (query_times[:, :, None] - key_times[:, None, :]).abs_().clamp_(min=1)
    return difference.float().log_().div_(BUCKET_WIDTH).to(torch.int64).clamp_(0, NUM_TIME_BUCKETS)


class BiasInputs(NamedTuple):
    """What relative biases are looked up by: ``distance [n, c]`` and ``buckets [g, n, c]`` int64, or None without times.

    n queries against c keys: those of a tile, or of a whole group. For tokens behind cached ones, both are ``[B, n, c]``.
    """

    distance: torch.Tensor
    buckets: torch.Tensor | None


class RelativeBias(torch.nn.Module):
    """``w_pos[N - 1 + j - i] + w_time[bucket(t_next(i) - t(j))]``, shared by the heads.

    max_length: N. t_next(i) is the time of the event after i (or of i itself, see `HSTU`); without timestamps the bias is by
    position alone.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.position = torch.nn.Parameter(torch.empty(2 * max_length - 1).normal_(std=0.02))
        self.time = torch.nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=0.02))

    def forward(self, inputs: BiasInputs) -> torch.Tensor:
        """``[1, n, c]`` or ``[g, 1, n, c]``."""
        known = [index for index in inputs if index is not None]
        return looked_up((self.position, self.time), known)

    def tables(self, inputs: list[BiasInputs]) -> TableBias:
        """The same for each tile of a layout, looked up where it is used."""
        if any(each.buckets is None for each in inputs):
            return TableBias((self.position,), [(each.distance,) for each in inputs])
        return TableBias((self.position, self.time), cast(list[tuple[torch.Tensor, ...]], inputs))


def bias_inputs(
    layout: Layout, max_length: int, events: Mapping[str, torch.Tensor], next_time: str, whole: bool = False
) -> list[BiasInputs]:
    """One for each tile of the layout, or for each group (whole); computed once a batch, shared by all blocks."""
    keys = events.get("timestamps")
    queries = events.get("next_timestamps") if next_time == "given" else keys
    inputs = []
    for group in layout.groups:
        columns = torch.arange(group.width, device=layout.device)
        times = None
        if keys is not None and queries is not None:
            times = group.gather(queries), group.gather(keys)
        everything = (len(group.lengths), 0, group.width, group.width)
        parts = [everything] if whole else [tile[:4] for tile in tiles(group, layout)]
        for rows, start, stop, seen in parts:
            distance = max_length - 1 + columns[None, :seen] - columns[start:stop, None]
            buckets = time_buckets(times[0][:rows, start:stop], times[1][:rows, :seen]) if times else None
            inputs.append(BiasInputs(distance, buckets))
    return inputs


def appended_bias_inputs(
    appended: Appended, max_length: int, events: Mapping[str, torch.Tensor], next_time: str
) -> BiasInputs:
    """`bias_inputs` of tokens behind cached ones: as many queries as are computed, all tokens as keys."""
    buckets = None
    if appended.times is not None:
        queries = events["next_timestamps" if next_time == "given" else "timestamps"]
        buckets = time_buckets(appended.layout.to_rectangle(queries), appended.times)
    return BiasInputs(max_length - 1 + appended.distances(), buckets)


class HstuBlock(torch.nn.Module):
    """``u, v, q, k = split(act(LN(x) W))``; ``a = LN(attention)``; ``x = W_o dropout(u * a) + b + x``.

    Attention is ``SiLU(q kᵀ + bias) / N`` with the constant N, or with "softmax_rel_bias" a softmax over all N columns of
    ``(q kᵀ + bias) / sqrt(dqk)``, padding and future columns included in its normaliser, the future then set to 0 (as
    published, so that variant is not causal). concat_ua: the output projection takes ``[u, a, u * a]``.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dqk: int,
        dv: int,
        max_length: int,
        normalization: str = "rel_bias",
        linear_activation: str = "silu",
        linear_dropout_rate: float = 0.0,
        attn_dropout_rate: float = 0.0,
        concat_ua: bool = False,
        relative_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.dqk, self.dv, self.max_length = num_heads, dqk, dv, max_length
        self.normalization = normalization
        self.activation = LINEAR_ACTIVATIONS[linear_activation]
        self.attn_dropout_rate = Dropout(attn_dropout_rate).rate
        self.concat_ua = concat_ua
        self.uvqk = torch.nn.Parameter(
            torch.empty(embedding_dim, 2 * num_heads * (dqk + dv)).normal_(std=0.02)
        )
        self.bias = RelativeBias(max_length) if relative_bias else None
        self.output = torch.nn.Linear(num_heads * dv * (3 if concat_ua else 1), embedding_dim)
        torch.nn.init.xavier_uniform_(self.output.weight)
        self.dropout = Dropout(linear_dropout_rate)

    def forward(self, x: torch.Tensor, layout: Layout, inputs: list[BiasInputs]) -> torch.Tensor:
        """x: ``[T, D]``; inputs: see `bias_inputs`."""
        u, q, k, v = self.project(x)
        return layout.mask(self.combine(x, u, self.attention(q, k, v, layout, inputs)))

    def append(
        self, x: torch.Tensor, appended: Appended, inputs: BiasInputs | None, cached: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues]:
        """`forward` of the tokens ``x [T, D]`` alone, behind the cached ones; "rel_bias" only."""
        u, q, k, v = self.project(x)
        block = appended.extend_block(cached, k, v)
        bias = None if self.bias is None else self.bias(inputs)
        attended = pointwise_over_cache(q, block, appended, bias, float(self.max_length))
        return self.combine(x, u, attended), block

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """u ``[T, H dv]``; q, k ``[T, H, dqk]``; v ``[T, H, dv]``."""
        width, heads = self.num_heads * self.dv, self.num_heads
        normed = layer_norm(x, eps=1e-6)
        projected = self.activation(normed @ self.uvqk)
        u, v, q, k = projected.split([width, width, heads * self.dqk, heads * self.dqk], dim=-1)
        return u, *(t.unflatten(-1, (heads, -1)) for t in (q, k, v))

    def combine(self, x: torch.Tensor, u: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x: ``[T, D]``; u: ``[T, H dv]``; attended: ``[T, H, dv]``."""
        attended = attended.flatten(1)
        a = layer_norm(attended, eps=1e-6)
        gated = torch.cat([u, a, u * a], dim=-1) if self.concat_ua else u * a
        return self.output(self.dropout(gated)) + x

    def attention(self, q, k, v, layout, inputs):
        rate = self.attn_dropout_rate if self.training else 0.0
        if self.normalization == "rel_bias":
            bias = None if self.bias is None else self.bias.tables(inputs)
            return pointwise_attention(q, k, v, layout, bias, float(self.max_length), rate)
        biases = None if self.bias is None else [self.bias(each) for each in inputs]
        return softmax_over_all_columns(q, k, v, layout, biases, self.max_length, rate)


@register_encoder("HSTU", gin_name="hstu_encoder")
class HSTU(torch.nn.Module):
    """A stack of `HstuBlock`.

    max_length: N = max_sequence_length + gr_output_length + 1, the constant divisor and the reach of the position bias.
    next_time: "given": the time bias of a position may use the time of the event it predicts, in training and evaluation;
    "hidden": it uses the position's own time. enable_relative_time_bias: False leaves the bias by position alone.
    """

    def __init__(
        self,
        embedding_dim: int,
        max_length: int,
        num_blocks: int = 2,
        num_heads: int = 1,
        dqk: int = 64,
        dv: int = 64,
        normalization: str = "rel_bias",
        linear_config: str = "uvqk",
        linear_activation: str = "silu",
        linear_dropout_rate: float = 0.0,
        attn_dropout_rate: float = 0.0,
        concat_ua: bool = False,
        enable_relative_attention_bias: bool = True,
        enable_relative_time_bias: bool = True,
        next_time: str = "given",
        activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("normalization", normalization, NORMALIZATIONS)
        _check_choice("linear_config", linear_config, ("uvqk",))
        _check_choice("linear_activation", linear_activation, tuple(LINEAR_ACTIVATIONS))
        _check_choice("next_time", next_time, NEXT_TIMES)
        check_positive(num_blocks=num_blocks, num_heads=num_heads, dqk=dqk, dv=dv)
        self.causal = normalization == "rel_bias"
        self.output_dim = embedding_dim
        self.max_length, self.next_time = max_length, next_time
        self.timed = enable_relative_attention_bias and enable_relative_time_bias
        self.activation_checkpoint = activation_checkpoint
        self.blocks = torch.nn.ModuleList(
            HstuBlock(
                embedding_dim, num_heads, dqk, dv, max_length, normalization, linear_activation,
                linear_dropout_rate, attn_dropout_rate, concat_ua, enable_relative_attention_bias,
            )
            for _ in range(num_blocks)
        )  # fmt: skip

    def forward(self, x: torch.Tensor, layout: Layout, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, D]`` to ``[T, D]``; events may hold ``timestamps`` and ``next_timestamps [T]``."""
        biased = self.blocks[0].bias is not None
        inputs = []
        if biased:
            times = events if self.timed else {}
            inputs = bias_inputs(layout, self.max_length, times, self.next_time, whole=not self.causal)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpoint and self.training, x, layout, inputs)
        return x

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        """The time bias of a token may know the time of the event after it."""
        return self.next_time == "given" and self.timed and "timestamps" in events

    def encode_appended(
        self,
        x: torch.Tensor,
        events: Mapping[str, torch.Tensor],
        appended: Appended,
        cached: Sequence[KeysValues],
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """See `incremental.IncrementalEncoder`; UserError for "softmax_rel_bias", and beyond max_length."""
        if not self.causal:
            raise UserError(
                'encode_incremental: the normaliser of "softmax_rel_bias" runs over later items too, so nothing can be '
                'kept; choose hstu_encoder.normalization "rel_bias"'
            )
        if appended.capacity > self.max_length:
            raise UserError(
                f"encode_incremental: {appended.capacity} tokens, and HSTU's max_length is {self.max_length}"
            )
        inputs = None
        if self.blocks[0].bias is not None:
            timed = appended if self.timed else replace(appended, times=None)
            inputs = appended_bias_inputs(timed, self.max_length, events, self.next_time)
        blocks = []
        for block, before in zip(cast(Iterable[HstuBlock], self.blocks), cached or repeat(None)):
            x, after = block.append(x, appended, inputs, before)
            blocks.append(after)
        return x, tuple(blocks)


def softmax_over_all_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    biases: list[torch.Tensor] | None,
    max_length: int,
    dropout_rate: float,
) -> torch.Tensor:
    """The published "softmax_rel_bias": columns without a token have score 0 (+ bias 0) and count in the normaliser."""
    outputs = []
    for index, group in enumerate(layout.groups):
        q_, k_, v_ = (group.gather(t).transpose(1, 2) for t in (q, k, v))
        logits = q_ @ k_.transpose(-1, -2)
        if biases is not None:
            logits = logits + biases[index]
        real = group.real()[:, None, None, :]
        logits = (logits * q.shape[-1] ** -0.5).masked_fill(~real, -torch.inf)
        empty = (max_length - group.lengths).clamp(min=0).float().log()[:, None, None, None]
        total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), empty.expand(*logits.shape[:-1], 1))
        weights = torch.exp(logits - total).tril()
        outputs.append((F.dropout(weights, dropout_rate) @ v_).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.keys.cells) if outputs else torch.zeros_like(v)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(choices)}")
