"""Inverted dropout whose masks cost little on a CPU.

torch draws one Bernoulli variable per element from a slow serial generator; here 64 bits of SFC64 (numpy's) serve four
elements, so the rate is rounded to a multiple of 2^-16. Each source of masks is seeded by one draw from torch's default
generator, so `torch.manual_seed` decides them all.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


class KeepMasks:
    """A source of masks: 0 with probability ``rate``, else 1, in the dtype and on the device of ``like``."""

    def __init__(self, rate: float, like: torch.Tensor) -> None:
        self.rate, self.dtype, self.device = rate, like.dtype, like.device
        if self.device.type == "cpu":
            seed = int(torch.empty((), dtype=torch.int64).random_())
            self.generator = np.random.Generator(np.random.SFC64(seed))

    def draw(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """A new tensor of the given shape."""
        if self.device.type != "cpu":
            return (torch.rand(shape, device=self.device) >= self.rate).to(self.dtype)
        count = math.prod(shape)
        words = self.generator.integers(0, 1 << 64, (count + 3) // 4, dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16))[:count]
        threshold = round(self.rate * _LEVELS) - _LEVELS // 2
        return torch.ge(bits, threshold, out=torch.empty(count, dtype=self.dtype)).view(shape)


def dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """``x`` with a share ``rate`` of elements set to 0 and the rest scaled by 1 / (1 - rate), when training."""
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    return KeepMasks(rate, x).draw(x.shape).mul_(1.0 / (1.0 - rate)) * x


class Dropout(torch.nn.Module):
    """Module form of `dropout`; rate in [0, 1)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.rate, self.training)
