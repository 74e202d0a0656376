"""Initialisation that the encoders share."""

from __future__ import annotations

import torch


def truncated_normal_(x: torch.Tensor, std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Normal(0, std²) truncated to two standard deviations, in place, in blocks so that large tables cost no copies."""
    with torch.no_grad():
        for block in x.view(-1, x.shape[-1]).split(1 << 16):
            torch.nn.init.trunc_normal_(block, 0.0, std, -2.0 * std, 2.0 * std, generator=generator)
    return x
