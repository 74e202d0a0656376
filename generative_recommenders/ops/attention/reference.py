"""References of attention as its equations: one dense matrix ``[B, H, n, n]`` for all rows of a layout.

n is the longest row of jagged tokens, and all columns of whole rectangles. Of those, without dropout, they are
operations that an exporter understands whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
)
from generative_recommenders.ops.jagged import jagged_to_padded
from generative_recommenders.ops.layout import Layout


def softmax_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, dropout_rate: float, scale: float
) -> torch.Tensor:
    """`ops.attention.softmax.softmax_attention`, under the dropout masks that it draws on a CPU from the same seed."""
    with dispatch.autocast(q, None):
        mask = _mask(layout)
        logits = _by_row(q, layout) @ _by_row(k, layout).mT * scale
        # The lowest finite number, not -inf: a token that attends to nothing is then uniform, not NaN, and set to 0.
        weights = logits.masked_fill(~mask, lowest(logits.dtype)).softmax(-1) * mask.any(-1, keepdim=True)
        return _attended(weights, q, v, layout, dropout_rate)


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
    with dispatch.autocast(q, None):
        logits = _by_row(q, layout) @ _by_row(k, layout).mT
        tables, indices = bias or TableBias((), [])
        for place, table in enumerate(tables):
            logits = logits + _looked_up(table, [each[place] for each in indices], layout).to(q.dtype)
        return _attended(F.silu(logits) * _mask(layout) / divisor, q, v, layout, dropout_rate)


def table_attention_reference(v: torch.Tensor, layout: Layout, bias: TableBias) -> list[torch.Tensor]:
    """`ops.attention.tables.table_attention`."""
    outputs = []
    for place, table in enumerate(bias.tables):
        weights = _looked_up(table, [each[place] for each in bias.indices], layout).to(v.dtype) * _mask(layout)
        outputs.append(_attended(weights, v, v, layout, 0.0, ("place", "time")[place]))  # as in `RelativeBias.tables`
    return outputs


def _attended(
    weights: torch.Tensor, q: torch.Tensor, v: torch.Tensor, layout: Layout, dropout_rate: float, by: str = ""
) -> torch.Tensor:
    """``weights [B, H, n, n]`` after inverted dropout times the values, ``[T, H, d]``. q: has the masks' dtype. by: see
    `Observed`."""
    if layout.valid is None:
        observe(weights[:1].flatten(0, 1)[:, : layout.num_tokens, : layout.num_tokens], by)
    plan, heads = plan_of(layout) if dropout_rate else [], q.shape[1]
    masks = keep_masks(dropout_rate, q, plan)
    if masks is not None:
        tiles = ((group, tile) for group, group_tiles in plan for tile in group_tiles)
        shapes = (((t.rows * heads, t.stop - t.start, t.keys), group, t) for group, t in tiles)
        kept = (drawn(masks, shape, layout, group, t).unflatten(0, (-1, heads)) for shape, group, t in shapes)
        weights = weights * _joined(kept, layout, torch.zeros_like(weights)) / (1.0 - dropout_rate)
    return layout.flatten((weights @ _by_row(v, layout)).transpose(1, 2))


def _looked_up(table: torch.Tensor, indices: Sequence[torch.Tensor], layout: Layout) -> torch.Tensor:
    """``[B, 1, n, n]``, or ``[1, n, n]`` for all rows: numbers of a table by the indices of all tiles."""
    if layout.valid is not None and len(indices) == 1:  # a tile of everything: an exporter's sizes are symbols
        return table[indices[0]].unsqueeze(-3)
    parts = (gathered(table, index).unsqueeze(-3) for index in indices)
    return _joined(parts, layout, table.new_zeros(layout.num_rows, 1, layout.longest, layout.longest))


def _joined(parts: Iterable[torch.Tensor], layout: Layout, into: torch.Tensor) -> torch.Tensor:
    """``into [B, H, n, n]`` with the cells of all tiles written in: parts ``[rows, H, queries, keys]``, one a tile."""
    remaining = iter(parts)
    for group, tiles in plan_of(layout):
        rows = layout.row_of[group.keys.tokens.view(-1, group.width)[:, 0].long()]
        for tile in tiles:
            into[rows[: tile.rows], :, tile.start : tile.stop, : tile.keys] = next(remaining)
    return into


def _rectangle(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[T, ...]`` as ``[B, n, ...]``; what lies in padding is anything."""
    if layout.valid is None:
        return jagged_to_padded(x, layout.offsets, layout.longest)
    return x.reshape(layout.num_rows, layout.max_length, *x.shape[1:])


def _by_row(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[T, H, d]`` as ``[B, H, n, d]``."""
    return _rectangle(x, layout).transpose(1, 2)


def _mask(layout: Layout) -> torch.Tensor:
    """bool ``[B, 1, n, n]`` or ``[n, n]``: which cells of a row (columns) each of its cells attends to."""
    columns = torch.arange(layout.longest, device=layout.device)
    if layout.attention_mask is None:
        return columns <= columns[:, None]  # padding lies after what is real, which does not attend to it
    key, query = (_rectangle(x, layout) for x in (layout.attention_mask.key, layout.attention_mask.query))
    real = columns < layout.lengths[:, None]
    return ((key[:, None, :] <= query[:, :, None]) & real[:, None, :])[:, None]
