"""Attention over one rectangle of whole rows, in operations that an exporter understands whatever the sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops.attention.tiles import TableBias, lowest
from generative_recommenders.ops.layout import Layout


def rectangular_softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """`ops.attention.softmax.softmax_attention` without dropout."""
    q, k, v = (_by_row(x, layout) for x in (q, k, v))
    sees = _sees(layout)
    weights = (q @ k.mT * scale).masked_fill(~sees, lowest(q.dtype)).softmax(-1)
    weights = weights * sees.any(-1, keepdim=True)  # a token may see nothing
    return (weights @ v).transpose(1, 2).flatten(0, 1)


def rectangular_pointwise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, bias: TableBias | None, divisor: float
) -> torch.Tensor:
    """`ops.attention.pointwise.pointwise_attention` without dropout."""
    q, k, v = (_by_row(x, layout) for x in (q, k, v))
    logits = q @ k.mT
    if bias is not None:
        for table, index in zip(bias.tables, bias.indices[0]):
            logits = logits + table[index].unsqueeze(-3)  # the same for all heads
    return (F.silu(logits) * _sees(layout) / divisor @ v).transpose(1, 2).flatten(0, 1)


def rectangular_tables(v: torch.Tensor, layout: Layout, bias: TableBias) -> list[torch.Tensor]:
    """`ops.attention.tables.table_attention`."""
    v, sees = _by_row(v, layout), _sees(layout)
    weights = (table[index].unsqueeze(-3) * sees for table, index in zip(bias.tables, bias.indices[0]))
    return [(each @ v).transpose(1, 2).flatten(0, 1) for each in weights]


def _by_row(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[T, H, d]`` as ``[B, H, N, d]``."""
    return x.reshape(layout.num_rows, layout.max_length, x.shape[1], x.shape[2]).transpose(1, 2)


def _sees(layout: Layout) -> torch.Tensor:
    """bool ``[B, 1, N, N]`` or ``[N, N]``; where all is causal padding lies behind what is real, and is not seen."""
    columns = torch.arange(layout.max_length, device=layout.device)
    if layout.attention_mask is None:
        return columns <= columns[:, None]
    assert layout.valid is not None
    key, query, valid = (
        x.reshape(layout.num_rows, layout.max_length)
        for x in (layout.attention_mask.key, layout.attention_mask.query, layout.valid)
    )
    return ((key[:, None, :] <= query[:, :, None]) & valid[:, None, :])[:, None]
