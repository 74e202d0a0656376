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
_BLOCK = 1 << 23  # elements, 16 MiB of bits


class KeepMasks:
    """A source of masks: 0 with probability ``rate``, else 1, in the dtype and on the device of ``like``."""

    def __init__(self, rate: float, like: torch.Tensor, elements: int = 0) -> None:
        """elements: how many will be drawn. Their bits are made together: one wait of torch's other threads, not many."""
        self.rate, self.dtype, self.device = rate, like.dtype, like.device
        self.elements = elements
        if self.device.type == "cpu":
            seed = int(torch.empty((), dtype=torch.int64).random_())
            self.generator = np.random.SFC64(seed)
            self.bits = torch.empty(0, dtype=torch.int16)

    def draw(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """A new tensor of the given shape."""
        if self.device.type != "cpu":
            return (torch.rand(shape, device=self.device) >= self.rate).to(self.dtype)
        count = math.prod(shape)
        if count > self.bits.numel():
            words = -(-max(count, min(self.elements, _BLOCK)) // 4)
            self.bits = torch.from_numpy(self.generator.random_raw(words).view(np.int16))
        bits, self.bits = self.bits[:count], self.bits[count:]
        self.elements -= count
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
