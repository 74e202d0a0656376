"""Inverted dropout whose masks cost little on a CPU.

torch draws one Bernoulli variable per element; here 64 random bits serve four elements, so the rate is rounded to a
multiple of 2^-16. Draws come from torch's default generator of the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


def dropout_multiplier(shape: torch.Size | tuple[int, ...], rate: float, like: torch.Tensor) -> torch.Tensor:
    """0 with probability ``rate``, else 1 / (1 - rate); of the given shape, in the dtype and on the device of ``like``."""
    if like.device.type != "cpu":
        return (torch.rand(shape, device=like.device) >= rate).to(like.dtype).div_(1.0 - rate)
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    threshold = round(rate * _LEVELS) - _LEVELS // 2
    kept = torch.ge(bits, threshold, out=torch.empty(count, dtype=like.dtype))
    return kept.mul_(1.0 / (1.0 - rate)).view(shape)


def dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """``x`` with a share ``rate`` of elements set to 0 and the rest scaled by 1 / (1 - rate), when training."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    return x * dropout_multiplier(x.shape, rate, x)


class Dropout(torch.nn.Module):
    """Module form of `dropout`; rate in [0, 1)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.rate, self.training)
