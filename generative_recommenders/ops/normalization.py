"""Layer norm without weights (arXiv 1607.06450)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis; variance of the population.

    The weights that change nothing are given all the same: without any torch's CPU kernel takes twice as long.
    """
    width = x.shape[-1:]
    return F.layer_norm(x, width, x.new_ones(width), x.new_zeros(width), eps)


class LayerNorm(torch.nn.Module):
    """Module form of `layer_norm`."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps)
