"""Checkpoints read by the main process alone and sent to the others, since hosts need not share a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from generative_recommenders.checkpoint.store import Checkpoint, Position
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.distributed.sync import on_main
from generative_recommenders.errors import UserError


def checkpoint_from_main(collectives: Collectives, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Result of ``read()``, which the main process alone calls, on every process.

    Elsewhere its path is the main process's, where there may be no files.
    """
    own = on_main(collectives, read)
    header = None
    # What lies in files by rows is read later, each process's part (`with_rows`).
    if own is not None:
        described = [(name, str(x.dtype).removeprefix("torch."), x.shape) for name, x in own.tensors.items()]
        known = (str(own.path), own.position, own.state, own.metric, own.is_best)
        rows = {name: (str(x).removeprefix("torch."), shape) for name, (x, shape) in own.row_shapes.items()}
        header = {"known": known, "tensors": described, "rows": rows}
    header = collectives.broadcast_object_json(header)
    if header is None:
        return None
    if own is None:
        path, position, state, metric, is_best = header["known"]
        empty = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in header["tensors"]}
        shapes = {name: (getattr(torch, dtype), shape) for name, (dtype, shape) in header["rows"].items()}
        own = Checkpoint(Path(path), Position(*position), empty, state, metric, is_best, shapes)
    for name, _, _ in header["tensors"]:  # in one order, that of the main process
        collectives.broadcast_(own.tensors[name])
    return own


def with_rows(
    collectives: Collectives, checkpoint: Checkpoint, names: Iterable[str], shard: RowShard | None
) -> Checkpoint:
    """The checkpoint with tensors that are held by rows: of a sharded table this process's rows, else the whole.

    names: of these tensors. The main process reads and sends them, a shard at a time.
    """
    tensors = dict(checkpoint.tensors)
    for name in sorted(names):
        if name in tensors:  # a run wrote it that was not sharded
            if shard is not None and len(tensors[name]) == shard.num_rows:
                tensors[name] = tensors[name][shard.first : shard.stop].clone()
        elif name in checkpoint.row_shapes:
            dtype, shape = checkpoint.row_shapes[name]
            if shard is None:
                tensors[name] = collectives.broadcast_(_rows(checkpoint, name, 0, shape[0]))
                continue
            if shape[0] != shard.num_rows:
                raise UserError(
                    f"{checkpoint.path} does not fit the configuration: {name} has {shape[0]} rows, "
                    f"not {shard.num_rows}"
                )
            tensors[name] = torch.empty((shard.stop - shard.first, *shape[1:]), dtype=dtype)
            for rank, (first, stop) in enumerate(pairwise(shard.bounds)):
                if collectives.is_main:
                    rows = _rows(checkpoint, name, first, stop)
                    tensors[name] = rows if rank == 0 else tensors[name]
                    collectives.send_(rows, 0, rank)
                elif rank == collectives.rank:
                    collectives.send_(tensors[name], 0, rank)
    return replace(checkpoint, tensors=tensors)


def _rows(checkpoint: Checkpoint, name: str, first: int, stop: int) -> torch.Tensor:
    """Rows of a tensor, or on other processes than the main one memory for them."""
    if checkpoint.rows is not None:
        return checkpoint.rows.read(name, first, stop)
    dtype, shape = checkpoint.row_shapes[name]
    return torch.empty((stop - first, *shape[1:]), dtype=dtype)


def shards_on_main(
    collectives: Collectives, shard: RowShard, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Bounds and rows of each process's shard in turn, on the main process; the others, which send theirs, get their
    own.

    tensors: this process's rows, by name.
    """
    for rank, (first, stop) in enumerate(pairwise(shard.bounds)):
        rows = {}
        for name, own in sorted(tensors.items()):
            received = own.detach()
            if collectives.is_main and rank > 0:
                received = torch.empty((stop - first, *own.shape[1:]), dtype=own.dtype)
            rows[name] = collectives.send_(received, rank, 0)
        yield first, stop, rows
