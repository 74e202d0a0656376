"""Checkpoints read by the main process alone and sent to the others, since hosts need not share a disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    header = None
    if own is not None:
        described = [(name, str(x.dtype).removeprefix("torch."), x.shape) for name, x in own.tensors.items()]
        known = (str(own.path), own.position, own.state, own.metric, own.is_best)
        header = {"known": known, "tensors": described}
    header = collectives.broadcast_object_json(header)
    if header is None:
        return None
    if own is None:
        path, position, state, metric, is_best = header["known"]
        empty = {
            name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in header["tensors"]
        }
        own = Checkpoint(Path(path), Position(*position), empty, state, metric, is_best)
    for name, _, _ in header["tensors"]:  # in one order, that of the main process
        collectives.broadcast_(own.tensors[name])
    return own
