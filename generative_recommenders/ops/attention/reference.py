"""References of attention as its equations: one dense matrix ``[H, T, T]`` for all tokens of a layout.

Of whole rectangles without dropout it is ``[B, H, N, N]``, in operations that an exporter understands whatever the
sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.observed import observe
from generative_recommenders.ops.attention.tiles import (
    TableBias,
    drawn,
    gathered,
    keep_masks,
    lowest,
    plan_of,
    sum_of_table_lookups,
)
from generative_recommenders.ops.layout import Layout


def softmax_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, dropout_rate: float, scale: float
) -> torch.Tensor:
    """`ops.attention.softmax.softmax_attention`, under the dropout masks that it draws on a CPU from the same seed."""
    if layout.valid is not None and dropout_rate == 0.0:
        q, k, v = (_by_row(x, layout) for x in (q, k, v))
        return _as_tokens(_softmax(q @ k.mT * scale, _row_mask(layout)) @ v)
    with dispatch.autocast(q, None):
        weights = _softmax(torch.einsum("ihd,jhd->hij", q, k) * scale, token_mask(layout))
        observe(weights)
        return torch.einsum("hij,jhd->ihd", dropped(weights, q, layout, dropout_rate), v)


def pointwise_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: TableBias | None,
    divisor: float,
    dropout_rate: float,
) -> torch.Tensor:
    """`ops.attention.pointwise.pointwise_attention`, under the dropout masks that it draws on a CPU from the same
    seed."""
    if layout.valid is not None and dropout_rate == 0.0 and (bias is None or len(bias.indices) == 1):
        q, k, v = (_by_row(x, layout) for x in (q, k, v))
        logits = q @ k.mT
        for table, index in zip(bias.tables, bias.indices[0]) if bias else ():
            logits = logits + table[index].unsqueeze(-3)  # the same for all heads
        return _as_tokens(F.silu(logits) * _row_mask(layout) / divisor @ v)
    with dispatch.autocast(q, None):
        logits = torch.einsum("ihd,jhd->hij", q, k)
        if bias is not None:
            parts = (sum_of_table_lookups(bias.tables, index) for index in bias.indices)
            logits = logits + dense(parts, layout, torch.zeros_like(logits))
        weights = F.silu(logits) * token_mask(layout) / divisor
        observe(weights)
        return torch.einsum("hij,jhd->ihd", dropped(weights, q, layout, dropout_rate), v)


def table_attention_reference(v: torch.Tensor, layout: Layout, bias: TableBias) -> list[torch.Tensor]:
    """`ops.attention.tables.table_attention`."""
    if layout.valid is not None and len(bias.indices) == 1:
        v, mask = _by_row(v, layout), _row_mask(layout)
        indexed = zip(bias.tables, bias.indices[0])
        return [_as_tokens(table[index].unsqueeze(-3) * mask @ v) for table, index in indexed]
    outputs = []
    for place, table in enumerate(bias.tables):
        parts = (gathered(table, index[place]).unsqueeze(-3) for index in bias.indices)
        weights = dense(parts, layout, v.new_zeros(1, layout.num_tokens, layout.num_tokens))
        weights *= token_mask(layout)
        observe(weights, ("place", "time")[place])  # the order of `RelativeBias.tables`
        outputs.append(torch.einsum("ij,jhd->ihd", weights[0], v))
    return outputs


def token_mask(layout: Layout) -> torch.Tensor:
    """``[T, T]`` bool: which tokens (columns) each token attends to."""
    places = torch.arange(layout.num_tokens, device=layout.device)
    one_row = layout.row_of[:, None] == layout.row_of
    if layout.attention_mask is None:
        return one_row & (places <= places[:, None])
    mask = one_row & (layout.attention_mask.key <= layout.attention_mask.query[:, None])
    return mask if layout.valid is None else mask & layout.valid.T


def dropped(weights: torch.Tensor, q: torch.Tensor, layout: Layout, rate: float) -> torch.Tensor:
    """``weights [H, T, T]`` after inverted dropout. q: ``[T, H, d]``, whose dtype and device masks have."""
    heads, plan = q.shape[1], plan_of(layout)
    masks = keep_masks(rate, q, plan)
    if masks is None:
        return weights
    tiles = ((group, tile) for group, group_tiles in plan for tile in group_tiles)
    shapes = (((t.rows * heads, t.stop - t.start, t.keys), group, t) for group, t in tiles)
    kept = (drawn(masks, shape, layout, group, t).unflatten(0, (-1, heads)) for shape, group, t in shapes)
    return weights * dense(kept, layout, torch.zeros_like(weights)) / (1.0 - rate)


def dense(parts: Iterable[torch.Tensor], layout: Layout, into: torch.Tensor) -> torch.Tensor:
    """``into [H, T, T]`` with the cells of all tiles written in: parts ``[rows, H, queries, keys]``, one a tile."""
    remaining = iter(parts)
    for group, tiles in plan_of(layout):
        tokens = group.keys.tokens.view(-1, group.width).long()
        for tile in tiles:
            part = next(remaining)
            part = part.expand(tile.rows, len(into), *part.shape[-2:])
            for row, length in enumerate(group.lengths[: tile.rows].tolist()):
                queries = tokens[row, tile.start : min(tile.stop, length)]
                keys = tokens[row, : min(tile.keys, length)]
                into[:, queries[:, None], keys] = part[row, :, : len(queries), : len(keys)]
    return into


def _softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # The lowest finite number, not -inf: a row that attends to nothing is then uniform, not NaN, and set to 0.
    weights = logits.masked_fill(~mask, lowest(logits.dtype)).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def _as_tokens(attended: torch.Tensor) -> torch.Tensor:
    """``[B, H, N, d]`` as ``[T, H, d]``."""
    return attended.transpose(1, 2).flatten(0, 1)


def _by_row(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[T, H, d]`` as ``[B, H, N, d]``."""
    return x.reshape(layout.num_rows, layout.max_length, x.shape[1], x.shape[2]).transpose(1, 2)


def _row_mask(layout: Layout) -> torch.Tensor:
    """bool ``[B, 1, N, N]`` or ``[N, N]``; where all is causal padding lies after what is real, which does not attend
    to it."""
    columns = torch.arange(layout.max_length, device=layout.device)
    if layout.attention_mask is None:
        return columns <= columns[:, None]
    assert layout.valid is not None
    key, query, valid = (
        x.reshape(layout.num_rows, layout.max_length)
        for x in (layout.attention_mask.key, layout.attention_mask.query, layout.valid)
    )
    return ((key[:, None, :] <= query[:, :, None]) & valid[:, None, :])[:, None]
