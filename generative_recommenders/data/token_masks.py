"""Random choices of positions to hide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from generative_recommenders.ops.counter_random import CounterDraws

Draws: TypeAlias = torch.Generator | CounterDraws | None
"""Where random choices come from: a generator, numbered rows (the same whatever else is drawn), or torch's own
generator."""


def uniform(shape: Sequence[int], device: torch.device, draws: Draws) -> Tensor:
    """Uniform draws in [0, 1), float32; the last two axes are rows and columns. Drawn where ``draws`` is, and moved."""
    if isinstance(draws, CounterDraws):
        *several, rows, width = shape
        parts = [draws.uniform(width) for _ in range(math.prod(several))]
        return torch.stack(parts).view(*several, rows, width).to(device)
    source = device if draws is None else draws.device
    return torch.rand(*shape, generator=draws, device=source).to(device)


def proper_part(chosen: Tensor, real: Tensor, order: Tensor) -> Tensor:
    """Corrects a choice so that in every row some, but not all, real positions are chosen.

    chosen, real: ``[B, N]`` bool; order: ``[B, N]`` float draws. A row without a choice gains its real
    position of smallest ``order``; a row with everything chosen loses the one of largest; a row with one
    real position ends with none. Padding is never chosen. For draws in [0, 1).
    """
    if real.shape[-1] == 0:
        return chosen & real
    lowest = order.masked_fill(~real, 2.0).argmin(-1, keepdim=True)
    highest = order.masked_fill(~real, -1.0).argmax(-1, keepdim=True)
    chosen = chosen & real
    chosen = chosen.scatter(-1, lowest, chosen.gather(-1, lowest) | ~chosen.any(-1, keepdim=True)) & real
    everything = (chosen == real).all(-1, keepdim=True)
    return chosen.scatter(-1, highest, chosen.gather(-1, highest) & ~everything)
