"""Inverted dropout whose masks cost little on a CPU.

torch draws one Bernoulli variable per element; here 64 random bits serve four elements, so the rate is rounded to a
multiple of 2^-16. On other devices torch's own dropout is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


def keep_mask(shape: torch.Size | tuple[int, ...], rate: float, device: torch.device) -> torch.Tensor:
    """Bool mask of the given shape, True with probability 1 - rate, from torch's default generator."""
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= rate
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = round(rate * _LEVELS) - _LEVELS // 2
    return (words.view(torch.int16)[:count] >= threshold).view(shape)


def dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """``x`` with a share ``rate`` of elements set to 0 and the rest scaled by 1 / (1 - rate), when training."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    return _CpuDropout.apply(x, keep_mask(x.shape, rate, x.device), 1.0 / (1.0 - rate))


class Dropout(torch.nn.Module):
    """Module form of `dropout`; rate in [0, 1)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.rate, self.training)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None
