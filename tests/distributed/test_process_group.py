"""Process group: collectives of one and several processes, and their devices."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.process_group import (
    is_first_on_host,
    join_group,
    process_collectives,
    process_device,
)
from generative_recommenders.errors import UserError
from programs import quick_start

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


def own_rows(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """rank rows: the first process has none."""
    return (torch.arange(2 * rank).view(rank, 2) + rank).to(dtype)


def checks(group: Collectives) -> list[str]:
    """What went wrong, by name."""
    rank, world = group.rank, group.world_size
    total = torch.full((2, 3), rank + 1).t()
    summed = group.sum_(total)
    wanted = world * (world + 1) // 2
    gathered = [group.gather_variable(own_rows(rank, dtype)) for dtype in DTYPES]
    expected = [torch.cat([own_rows(each, dtype) for each in range(world)]) for dtype in DTYPES]
    leaf = torch.ones(1, 2, requires_grad=True)
    results = {
        "sum_ in place": summed is total and torch.equal(total, torch.full((3, 2), wanted)),
        "sum_ bfloat16": group.sum_(torch.ones(2, dtype=torch.bfloat16)).tolist() == [world, world],
        "sum_scalar": group.sum_scalar(0.1 + rank) == pytest.approx(0.1 * world + wanted - world, abs=1e-15),
        "gather": all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(gathered, expected)),
        "gather nothing": group.gather_variable(torch.zeros(0, 3)).shape == (0, 3),
        "gather a leaf": not group.gather_variable(leaf).requires_grad,
        "broadcast": group.broadcast_object_json({"run": ("книга", rank)}) == {"run": ["книга", 0]},
        "broadcast null": group.broadcast_object_json(None if rank == 0 else "other") is None,
        "any": group.any(rank == world - 1) and not group.any(False),
        "any of no answer": not group.any(None),
        "is_main": group.is_main == (rank == 0),
    }
    group.barrier()
    return [name for name, correct in results.items() if not correct]


def in_group(rank: int, world: int, rendezvous: str, failures) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    failures.put(checks(process_collectives("cpu")))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_process_group(tmp_path, world):
    context = quick_start()
    failures = context.Queue()
    rendezvous = str(tmp_path / "rendezvous")
    members = [context.Process(target=in_group, args=(rank, world, rendezvous, failures)) for rank in range(world)]
    for member in members:
        member.start()
    assert [failures.get(timeout=60) for _ in members] == [[]] * world
    for member in members:
        member.join()


def test_one_process_is_the_same_without_a_group():
    assert checks(process_collectives("cpu")) == []


def test_device(monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_device("cpu") == torch.device("cpu")
    assert process_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert process_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_device() == torch.device("cpu")


def test_a_process_without_peers_is_first_on_its_host(monkeypatch):
    """Whatever a launcher of something else left in the environment."""
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert is_first_on_host()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="no GPU for local rank 2: at most one process a GPU, and this host has 2"):
        join_group(2, 3, 3, "cuda", timedelta(seconds=1))
