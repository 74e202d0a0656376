"""Checkpoints read by the main process alone and sent to the others, since hosts need not share a disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from generative_recommenders.checkpoint.store import Checkpoint, Position
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.sync import together


def checkpoint_from_main(
    collectives: Collectives, read: Callable[[], Checkpoint | None]
) -> Checkpoint | None:
    """What ``read()`` of the main process returns, on every process; only there it is called.

    Elsewhere its path is the main process's, where there may be no files.
    """
    own = together(collectives, lambda: read() if collectives.is_main else None)
    header = collectives.broadcast_object_json(None if own is None else _header(own))
    if header is None:
        return None
    tensors = own.tensors if own is not None else _empty_tensors(header["tensors"])
    for name, _, _ in header["tensors"]:
        collectives.broadcast_(tensors[name])
    if own is not None:
        return own
    position = Position(*header["position"])
    return Checkpoint(
        Path(header["path"]), position, tensors, header["state"], header["metric"], header["is_best"]
    )


def _header(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "position": checkpoint.position,
        "state": checkpoint.state,
        "metric": checkpoint.metric,
        "is_best": checkpoint.is_best,
        "tensors": [
            (name, str(x.dtype).removeprefix("torch."), x.shape) for name, x in checkpoint.tensors.items()
        ],
    }


def _empty_tensors(descriptions: list[tuple[str, str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in descriptions}
