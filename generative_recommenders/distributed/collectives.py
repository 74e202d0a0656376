"""Collective operations over the processes of a run, and their form on a single process.

Objectives and evaluation take a `Collectives` object and so stay free of torch.distributed; the form that talks to
other processes is `distributed.process_group.ProcessGroup`.
"""

from __future__ import annotations

import json
from typing import Any

import torch


class Collectives:
    """One process: every exchange is the identity. Every process of a run must make the same calls in the same order.

    rank: 0 .. world_size - 1. device: where this process computes.
    """

    rank: int = 0
    world_size: int = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and log lines."""
        return self.rank == 0

    # -- exchanges of tensors, by which processes differ from one --------------------------------------------------

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites a number tensor (any shape, equal on all processes) with its sum over processes; returns it."""
        return tensor

    def gather_variable(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[n, ...]`` with n of each process's own to ``[sum of n, ...]`` in rank order, on every process.

        No gradient flows through it.
        """
        return tensor.detach()

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites a contiguous tensor (dtype and shape equal on all processes) with the main process's; returns
        it."""
        return tensor

    def exchange(
        self, tensor: torch.Tensor, counts: list[int], expected: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """All-to-all. tensor: ``[sum of counts, ...]``, so many rows for each process, in rank order. Returns what each
        of them has for this one, in rank order, and how many rows; expected: these numbers, where they are known.

        No gradient flows through it.
        """
        return tensor.detach(), counts

    def send_(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Overwrites a contiguous tensor (dtype and shape equal on both) of one process with another one's; returns it.
        Only these two need to call."""
        return tensor

    # -- made of them ----------------------------------------------------------------------------------------------

    def sum_scalar(self, value: float) -> float:
        """The sum of one number a process, in float64."""
        return float(self.sum_(torch.tensor(float(value), dtype=torch.float64)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.sum_scalar(bool(flag)) > 0

    def barrier(self) -> None:
        """Returns once every process has called it."""
        self.sum_scalar(0.0)  # NCCL's own barrier has to guess the device; a sum is on ours

    def broadcast_object_json(self, value: Any) -> Any:
        """The main process's value everywhere, as JSON returns it (tuples become lists). Other processes' is not
        read."""
        text = json.dumps(value).encode() if self.is_main else b""
        length = int(self.sum_scalar(len(text)))  # others have to know it, and count 0 themselves
        sent = torch.frombuffer(bytearray(text) if self.is_main else bytearray(length), dtype=torch.uint8)
        return json.loads(bytes(self.broadcast_(sent).tolist()))

    def gather_object_json(self, value: Any) -> list[Any]:
        """Every process's value, as JSON returns it, in rank order."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.gather_variable(torch.tensor([text.numel()])).tolist()
        return [json.loads(bytes(part.tolist())) for part in self.gather_variable(text).split(lengths)]
