"""Ranks of single users' targets, of all processes."""

from __future__ import annotations

import torch

from generative_recommenders.distributed.collectives import Collectives

Ranks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Users, targets and ranks, ``[n]`` int64 on the CPU: internal ids from 1, by user; a rank above V is a miss."""


class UserRanks:
    """Collects what an evaluator records; `add` is its ``record``."""

    def __init__(self) -> None:
        self._parts: list[Ranks] = []

    def add(self, users: torch.Tensor, targets: torch.Tensor, ranks: torch.Tensor) -> None:
        """Of one batch, see `evaluator.Record`."""
        self._parts.append((users, targets, ranks))

    def gathered(self, collectives: Collectives) -> Ranks:
        """What all processes have measured."""
        none = torch.zeros(0, dtype=torch.int64)
        columns = [torch.cat([none, *each]) for each in zip(*self._parts)] or [none] * 3
        users, targets, ranks = (collectives.gather_variable(each).cpu() for each in columns)
        order = users.argsort()
        return users[order], targets[order], ranks[order]
