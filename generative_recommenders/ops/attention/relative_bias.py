"""HSTU's relative attention bias by position and time (arXiv 2402.17152, eq. 2), and the softmax over all columns that
goes with it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F

from generative_recommenders.ops.attention.observed import observe
from generative_recommenders.ops.attention.tiles import (
    PairBias,
    TableBias,
    Tile,
    drawn,
    keep_masks,
    sum_of_table_lookups,
    takes_kernel,
    tiles,
)
from generative_recommenders.ops.layout import Layout

NUM_TIME_BUCKETS = 128
BUCKET_WIDTH = 0.301


def time_buckets(query_times: torch.Tensor, key_times: torch.Tensor) -> torch.Tensor:
    """``[g, n, c]`` int64: trunc(ln(max(|t_query - t_key|, 1)) / 0.301), limited to 0..128.

    query_times ``[g, n]``, key_times ``[g, c]``: int64 seconds.
    """
    # Absolute and at least 1 s, as in the published code: 0 has no logarithm.
    difference = (query_times[:, :, None] - key_times[:, None, :]).abs_().clamp_(min=1)
    return difference.float().log_().div_(BUCKET_WIDTH).to(torch.int64).clamp_(0, NUM_TIME_BUCKETS)


class BiasInputs(NamedTuple):
    """Indices of the relative biases: ``distance [n, c]`` and ``buckets [g, n, c]`` int64, or None without times.

    n queries against c keys: those of a tile, or of a whole group. For tokens after cached ones, both are
    ``[B, n, c]``.
    """

    distance: torch.Tensor
    buckets: torch.Tensor | None


class PairInputs(NamedTuple):
    """The same for all pairs of a batch at once, as the kernels of a GPU read it: ``buckets [B, n, n]`` uint8 of rows
    padded to the longest, or None without times."""

    buckets: torch.Tensor | None


BatchInputs: TypeAlias = list[BiasInputs] | PairInputs
"""Of a batch: one for each tile of its layout or for each group; or of all pairs."""
Times = tuple[torch.Tensor, torch.Tensor]
"""Of tokens as queries and as keys, ``[T]`` int64 seconds each."""


def bias_inputs(
    layout: Layout, max_length: int, times: Times | None = None, whole: bool = False, head_width: int = 0
) -> BatchInputs:
    """Computed once a batch, shared by all blocks. whole: one for each group, whatever the device. head_width: of the
    attention that reads them, see `takes_kernel`."""
    if not whole and takes_kernel(layout, head_width):
        if times is None:
            return PairInputs(None)
        cells = layout.starts[:, None] + torch.arange(layout.longest, device=layout.device)
        cells = cells.clamp(max=max(layout.num_tokens - 1, 0))  # past a row's end buckets hold anything
        return PairInputs(time_buckets(*(each[cells] for each in times)).to(torch.uint8))
    inputs = []
    for group in layout.groups:
        columns = torch.arange(group.width, device=layout.device)
        own = None if times is None else [group.gather(each) for each in times]
        everything = (group.lengths.shape[0], 0, group.width, group.width)
        parts = [everything] if whole else [tile[:4] for tile in tiles(group, layout)]
        for rows, start, stop, keys in parts:
            distance = max_length - 1 + columns[None, :keys] - columns[start:stop, None]
            buckets = time_buckets(own[0][:rows, start:stop], own[1][:rows, :keys]) if own else None
            inputs.append(BiasInputs(distance, buckets))
    return inputs


class RelativeBias(torch.nn.Module):
    """``w_pos[N - 1 + j - i] + w_time[bucket(t_query(i) - t_key(j))]``, shared by the heads.

    max_length: N. Without times the bias is by position alone; by_position: False leaves that part at 0.
    """

    def __init__(self, max_length: int, by_position: bool = True) -> None:
        super().__init__()
        self.position: torch.Tensor
        if by_position:
            self.position = torch.nn.Parameter(torch.empty(2 * max_length - 1).normal_(std=0.02))
        else:
            self.register_buffer("position", torch.zeros(2 * max_length - 1))
        self.time = torch.nn.Parameter(torch.empty(NUM_TIME_BUCKETS + 1).normal_(std=0.02))

    def forward(self, inputs: BiasInputs) -> torch.Tensor:
        """``[1, n, c]`` or ``[g, 1, n, c]``."""
        known = [index for index in inputs if index is not None]
        return sum_of_table_lookups((self.position, self.time), known)

    def tables(self, inputs: BatchInputs) -> TableBias | PairBias:
        """The same for each tile of a layout, or for all pairs, looked up where it is used."""
        if isinstance(inputs, PairInputs):
            return PairBias(self.position, None if inputs.buckets is None else self.time, inputs.buckets)
        if any(each.buckets is None for each in inputs):
            return TableBias((self.position,), [(each.distance,) for each in inputs])
        return TableBias((self.position, self.time), cast(list[tuple[torch.Tensor, ...]], inputs))


def softmax_over_all_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    biases: list[torch.Tensor] | None,
    max_length: int,
    dropout_rate: float,
) -> torch.Tensor:
    """The published "softmax_rel_bias": softmax((q kᵀ + bias) / sqrt(dqk)) over all N columns, the future then set to
    0.

    q, k ``[T, H, dqk]``, v ``[T, H, dv]``; biases: one a group, `RelativeBias`. Columns without a token have score 0 (+
    bias 0) and count in the normaliser, as future ones do, so that this is not causal.
    """
    outputs = []
    masks = keep_masks(dropout_rate, q, [])
    for index, group in enumerate(layout.groups):
        q_, k_, v_ = (group.gather(t).transpose(1, 2) for t in (q, k, v))
        logits = q_ @ k_.transpose(-1, -2)
        if biases is not None:
            logits = logits + biases[index]
        real = group.real()[:, None, None, :]
        logits = (logits * q.shape[-1] ** -0.5).masked_fill(~real, -torch.inf)
        # Columns without a token have logit 0, exp(0) = 1 each: their sum is their number.
        empty = (max_length - group.lengths).clamp(min=0).float().log()[:, None, None, None]
        total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), empty.expand(*logits.shape[:-1], 1))
        weights = torch.exp(logits - total).tril()
        observe(weights[0])
        if masks is not None and masks.numbered is not None:
            everything = Tile(len(group.lengths), 0, group.width, group.width, 0, None)
            shape = weights.flatten(0, 1).shape
            kept = drawn(masks, shape, layout, group, everything).view_as(weights)
            weights = weights * kept / (1.0 - dropout_rate)
        else:
            weights = F.dropout(weights, dropout_rate)
        outputs.append((weights @ v_).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.keys.cells) if outputs else torch.zeros_like(v)
