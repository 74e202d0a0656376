"""Initialisation that parts of a model share."""

from __future__ import annotations

import torch

BLOCK = 1 << 16
"""Rows that are drawn at a time."""


def truncated_normal_(x: torch.Tensor, std: float = 0.02) -> torch.Tensor:
    """Normal(0, std²) truncated to two standard deviations, in place, in blocks so that large tables cost no copies."""
    with torch.no_grad():
        for block in x.view(-1, x.shape[-1]).split(BLOCK):
            torch.nn.init.trunc_normal_(block, 0.0, std, -2.0 * std, 2.0 * std)
    return x


def drawn_rows(num_rows: int, width: int, std: float, first: int, stop: int) -> torch.Tensor:
    """Rows [first, stop) of ``[num_rows, width]`` by `truncated_normal_`: the same numbers, without memory for the
    others."""
    # The rows of other processes are drawn too, so that all shards together are one table.
    kept, scratch = torch.empty(stop - first, width), torch.empty(min(BLOCK, num_rows), width)
    for start in range(0, num_rows, BLOCK):
        block = truncated_normal_(scratch[: num_rows - start], std)
        a, b = max(first, start), min(stop, start + len(block))
        if a < b:
            kept[a - first : b - first] = block[a - start : b - start]
    return kept


def xavier_normal_matrices_(module: torch.nn.Module) -> None:
    """Draws every matrix of a module anew from Normal(0, 2 / (rows + columns)); vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
