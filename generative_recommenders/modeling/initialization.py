"""Initialisation that parts of a model share."""

from __future__ import annotations

import torch


def truncated_normal_(x: torch.Tensor, std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Normal(0, std²) truncated to two standard deviations, in place, in blocks so that large tables cost no copies."""
    with torch.no_grad():
        for block in x.view(-1, x.shape[-1]).split(1 << 16):
            torch.nn.init.trunc_normal_(block, 0.0, std, -2.0 * std, 2.0 * std, generator=generator)
    return x


def xavier_normal_matrices_(module: torch.nn.Module) -> None:
    """Draws every matrix of a module anew from Normal(0, 2 / (rows + columns)); vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
