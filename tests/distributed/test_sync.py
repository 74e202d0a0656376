"""Collective helpers: results and errors of one process reach all, and one alone reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from generative_recommenders.checkpoint.broadcast import checkpoint_from_main
from generative_recommenders.checkpoint.store import Checkpoint, Position
from generative_recommenders.distributed import process_group as distributed
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.process_group import process_collectives
from generative_recommenders.distributed.sync import from_main, raise_on_all_ranks
from generative_recommenders.errors import UserError
from programs import quick_start

TENSORS = {
    "weights": torch.arange(15.0).view(5, 3),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "bf16": torch.ones(3, dtype=torch.bfloat16) / 3,
    "none": torch.zeros(0, 4),
}
CHECKPOINT = Checkpoint(
    Path("run/000001-epoch-2-step-9"), Position(2, 9), TENSORS, {"progress": {"step": 9}}, 0.25, True
)


class OtherFault(UserError):
    exit_code = 3


def on_rank(rank: int, value: Any, mine: int) -> Any:
    assert mine == rank, "only this rank is asked"
    return value


def fault_of(collectives: Collectives, failing: int) -> tuple[str, int] | None:
    def work() -> None:
        if collectives.rank == failing:
            raise OtherFault(f"the fault of rank {failing}")

    try:
        raise_on_all_ranks(collectives, work)
    except UserError as error:
        return str(error), error.exit_code
    return None


def checks(group: Collectives) -> list[str]:
    """What went wrong, by name."""
    last = group.world_size - 1
    found = checkpoint_from_main(group, lambda: on_rank(0, CHECKPOINT, group.rank))
    assert found is not None
    results = {
        "no fault": raise_on_all_ranks(group, lambda: group.rank) == group.rank and fault_of(group, -1) is None,
        "fault": all(fault_of(group, rank) == (f"the fault of rank {rank}", 3) for rank in range(group.world_size)),
        "gather": group.gather_object_json(("книга" * group.rank, None))[last] == ["книга" * last, None],
        "main": from_main(group, lambda: on_rank(0, {"a": 1}, group.rank)) == {"a": 1},
        "no checkpoint": checkpoint_from_main(group, lambda: on_rank(0, None, group.rank)) is None,
        "tensors": list(found.tensors) == list(TENSORS)
        and all(torch.equal(found.tensors[name], value) for name, value in TENSORS.items()),
        "rest": (found.path, found.position, found.state, found.metric, found.is_best)
        == (CHECKPOINT.path, CHECKPOINT.position, CHECKPOINT.state, 0.25, True),
    }
    return [name for name, correct in results.items() if not correct]


def in_group(rank: int, world: int, rendezvous: str, failures) -> None:
    distributed.BROADCAST_BYTES = 8
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    failures.put(checks(process_collectives("cpu")))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_agreement(tmp_path: Path, world: int) -> None:
    if world == 1:
        assert checks(Collectives()) == []
        return
    context = quick_start()
    failures = context.Queue()
    members = [
        context.Process(target=in_group, args=(rank, world, str(tmp_path / "met"), failures)) for rank in range(world)
    ]
    for member in members:
        member.start()
    assert [failures.get(timeout=60) for _ in members] == [[]] * world
    for member in members:
        member.join()
