"""Batch types and the legend of shape letters.

Shape legend, used in every docstring of the package:

====  =======================================================
B     users (rows) of a batch
N     padded length: columns of a rectangle
T     tokens: the sum of the real lengths of a batch
D     embedding width
V     items of the catalogue; ids are 1..V, 0 is padding
R     negatives
P     positives of one position
H     attention heads
U     unique items that a step reads
====  =======================================================

Rectangles ``[B, N]`` hold small integers and are right-padded (oldest event first, 0 after the last).
Jagged tensors ``[T, ...]`` hold one row per real token, users one after the other, with ``offsets [B + 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

Batch = Mapping[str, torch.Tensor]
"""A loader's batch: names to small integer tensors (``[B, N]`` ids, ratings, timestamps; ``[B]`` lengths)."""


@dataclass(frozen=True)
class SequentialFeatures:
    """Histories to encode.

    past_lengths: ``[B]`` int64, real events a row.
    past_ids: ``[B, N]`` int64, right-padded with 0.
    past_events: further ``[B, N]`` columns: ``ratings`` float32, ``timestamps`` int64 (seconds), and per-row
        ``[B]`` columns: ``next_timestamps`` int64 (time of the event to predict, 0 where unknown; or ``[B, N]``, of
        every position), ``user_ids``.
    """

    past_lengths: torch.Tensor
    past_ids: torch.Tensor
    past_events: dict[str, torch.Tensor] = field(default_factory=dict)


class LossOutput(NamedTuple):
    """Output of a loss. A trainer divides ``sum`` by ``weight``, each summed over all processes.

    sum: scalar, differentiable.
    weight: scalar, no gradient; 0 when nothing counts (``sum`` is then 0 and the trainer changes nothing).
    auxiliary: weighted scalars by name, of the batch of all processes; each process has its part of their gradient.
    """

    sum: torch.Tensor
    weight: torch.Tensor
    auxiliary: Mapping[str, torch.Tensor] = MappingProxyType({})

    def mean(self) -> torch.Tensor:
        """``sum / weight`` and the auxiliary losses, scalar; NaN when nothing counts."""
        return self.sum / self.weight + sum(self.auxiliary.values())
