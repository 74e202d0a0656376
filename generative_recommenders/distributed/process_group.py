"""`Collectives` over torch.distributed: gloo between CPU processes, NCCL between GPUs."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError, first_line

BROADCAST_BYTES = 64 << 20
"""Size of the parts in which a tensor is sent that may be larger than a device's free memory."""


class ProcessGroup(Collectives):
    """The default process group, which must be initialised.

    Tensors that lie elsewhere than ``device`` are moved there for the exchange and back.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = tensor.detach().to(self.device).contiguous()
        dist.all_reduce(sent)
        with torch.no_grad():
            return tensor if sent.data_ptr() == tensor.data_ptr() else tensor.copy_(sent)

    def gather_variable(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        rows[self.rank] = tensor.shape[0]
        counts = self.sum_(rows).tolist()
        # All processes send one shape: fewer rows than the most are filled up, and cut off again.
        sent = tensor.new_zeros((max(counts), *tensor.shape[1:]), device=self.device, requires_grad=False)
        sent[: tensor.shape[0]] = tensor.detach()
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather([_as_bytes(each) for each in received], _as_bytes(sent))
        return torch.cat([each[:count] for each, count in zip(received, counts)]).to(tensor.device)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        for part in _parts(tensor):
            sent = part.to(self.device)
            dist.broadcast(sent, src=0)
            part.copy_(sent)
        return tensor

    def exchange(
        self, tensor: torch.Tensor, counts: list[int], expected: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        if expected is None:
            numbers = torch.tensor(counts, dtype=torch.int64, device=self.device)
            others = torch.empty_like(numbers)
            dist.all_to_all_single(others, numbers)
            expected = others.tolist()
        sent = tensor.detach().to(self.device).contiguous()
        received = sent.new_empty((sum(expected), *sent.shape[1:]))
        dist.all_to_all_single(received, sent, expected, counts)
        return received.to(tensor.device), expected

    def send_(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        if source == target or self.rank not in (source, target):
            return tensor
        for part in _parts(tensor):
            moved = part.to(self.device)
            if self.rank == source:
                dist.send(moved, target)
            else:
                dist.recv(moved, source)
                part.copy_(moved)
        return tensor


def process_collectives(device: torch.device | str) -> Collectives:
    """The collectives of this process: of its group where there is one, else those of a single process."""
    return ProcessGroup(device) if dist.is_initialized() else Collectives(device)


def is_first_on_host() -> bool:
    """Whether this process does what is done once a host: one without peers does, whatever the environment says."""
    return not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def process_device(device_type: str | None = None) -> torch.device:
    """Where this process computes: the GPU of its local rank, else the CPU. device_type: "cuda" or "cpu"
    to choose."""
    if (device_type or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    alone = torch.cuda.device_count() == 1  # SLURM may show each task its own GPU alone
    return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))


def join_group(
    rank: int,
    world_size: int,
    neighbours: int,
    device_type: str | None,
    timeout: timedelta,
    store: dist.Store | None = None,
) -> None:
    """Makes this process a member of the default group: NCCL where it computes on a GPU, gloo on a CPU.

    neighbours: processes that share this host's CPU cores. store: where the members meet; None: at
    MASTER_ADDR and MASTER_PORT. Raises UserError where the others cannot be met, or there is no GPU for this process.
    """
    device = process_device(device_type)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"there is no GPU for local rank {device.index}: at most one process a GPU, and this host has "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    elif neighbours > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"cannot meet the other {world_size - 1} processes at {where}: {first_line(error)}") from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, so that every dtype can be exchanged."""
    return tensor.view(-1).view(torch.uint8)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The memory of a contiguous tensor in parts of at most `BROADCAST_BYTES`; none of an empty one."""
    return _as_bytes(tensor.detach()).split(BROADCAST_BYTES) if tensor.numel() else ()
