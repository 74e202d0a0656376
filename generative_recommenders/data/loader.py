"""Batches from flat columns: vectorised, deterministic, the same whatever the number of processes.

A global batch is a run of consecutive users of the epoch's order; a process takes a run of its rows. Nothing here loops
over users in Python, and a batch depends on (seed, epoch, step) alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from generative_recommenders.config.sections import TrainingWindows
from generative_recommenders.data.preparation.event_store import consecutive
from generative_recommenders.data.store import SequenceDataset


@dataclass(frozen=True)
class LoadedBatch:
    """A process's rows of one global batch.

    columns: ``user_ids [B]``, ``lengths [B]``, ``item_ids [B, W]`` and, where the data have them,
    ``timestamps [B, W]``,
        int64, ``ratings [B, W]``, float32, and further event columns by name (see
        `schema.EventColumn.scaled`); right-padded with 0. first_row: place of row 0 in the global batch.
        first_token: how many next-item targets the rows before have (see `SequenceLoader`). first_last_target: how many
        of the rows before have any. step: place in the epoch.
    """

    columns: dict[str, torch.Tensor]
    step: int
    first_row: int
    first_token: int
    global_tokens: int
    first_last_target: int = 0


def cut_histories(
    dataset: SequenceDataset, users: np.ndarray, stops: np.ndarray, width: int, keep: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """The last ``width`` events before each user's stop, as columns of a batch.

    users, stops (positions in the sequences): ``[B]``. keep: bool for all events before the stops, one user's after the
    other's: which count; None for all.
    """
    if keep is None:
        lengths = np.minimum(stops, width)
        events = (dataset.offsets[users] + stops - lengths)[:, None] + np.arange(width)
    else:
        rows, kept = np.repeat(np.arange(users.size), stops)[keep], consecutive(dataset.offsets[users], stops)[keep]
        counts = np.bincount(rows, minlength=users.size)
        lengths = np.minimum(counts, width)
        column = np.arange(rows.size) - (np.cumsum(counts) - lengths)[rows]
        events, last = np.zeros((users.size, width), dtype=np.int64), column >= 0
        events[rows[last], column[last]] = kept[last]
    real = np.arange(width) < lengths[:, None]
    columns = {"user_ids": users.astype(np.int64) + 1, "lengths": lengths.astype(np.int64)}
    # Places beyond the data's end cannot be read: padding reads event 0, and is cleared.
    for name, values in event_values(dataset, np.where(real, events, 0)).items():
        columns[name] = np.where(real, values, values.dtype.type(0))
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in columns.items()}


def query_histories(
    dataset: SequenceDataset, users: np.ndarray, stops: np.ndarray, width: int
) -> dict[str, torch.Tensor]:
    """`cut_histories`, to recommend what comes next: the time of the request, ``next_timestamps``, is the last
    event's."""
    columns = cut_histories(dataset, users, stops, width)
    if "timestamps" in columns:
        last = (columns["lengths"] - 1).clamp(min=0)[:, None]
        columns["next_timestamps"] = columns["timestamps"].gather(1, last)[:, 0]
    return columns


def event_values(dataset: SequenceDataset, events: np.ndarray) -> dict[str, np.ndarray]:
    """All columns of the events at these places, as batches hold them."""
    columns = {"item_ids": dataset.items[events].astype(np.int64)}
    if dataset.ratings is not None:
        columns["ratings"] = dataset.ratings[events].astype(np.float32)
    if dataset.timestamps is not None:
        columns["timestamps"] = dataset.timestamps[events].astype(np.int64)
    for each in dataset.manifest.event_columns:
        columns[each.name] = each.scaled(dataset.extra[each.name][events])
    return columns


class SequenceLoader:
    """Training batches: of every user the last ``max_length + 1`` training events, so up to max_length targets each.

    batch_size: rows a process. sampling_ratio: share of each history kept, drawn anew each epoch, before truncation.
    windows: "all" cuts longer histories into rows of max_length targets, from the last target on, so that every event
    but a user's first is a target once an epoch; "last" takes the last row alone. Users with fewer than 2 training
    events give nothing to learn and are left out.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        train_stops: np.ndarray,
        max_length: int,
        batch_size: int,
        seed: int,
        sampling_ratio: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
        windows: TrainingWindows = "last",
    ) -> None:
        if not 0.0 < sampling_ratio <= 1.0:
            raise ValueError(f"positional_sampling_ratio must be in (0, 1], got {sampling_ratio}")
        self.dataset, self.width = dataset, max_length + 1
        stops = train_stops.astype(np.int64)
        users = np.flatnonzero(stops >= 2)
        # Of a history's stop - 1 targets, max_length go into a row: the quotient rounded up.
        repeats = np.ones_like(users) if windows == "last" else -((1 - stops[users]) // max_length)
        self.users = np.repeat(users, repeats)
        self.stops = stops[self.users] - consecutive(0, repeats) * max_length
        self.global_batch = batch_size * world_size
        self.seed, self.sampling_ratio = seed, sampling_ratio
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Steps an epoch."""
        return (self.users.size + self.global_batch - 1) // self.global_batch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[LoadedBatch]:
        order = self._generator(epoch, 0).permutation(self.users.size)
        for step in range(first_step, len(self)):
            yield self.batch(order[step * self.global_batch : (step + 1) * self.global_batch], epoch, step)

    def batch(self, rows: np.ndarray, epoch: int, step: int) -> LoadedBatch:
        """This process's share of the global batch of ``rows``, places in ``users`` and ``stops``."""
        users, stops = self.users[rows], self.stops[rows]
        bounds = [users.size * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        mine = slice(*bounds)
        if self.sampling_ratio < 1.0:
            # Every process draws for the whole global batch, and so gets the same lengths of all of its rows.
            keep = self._generator(epoch, 1 + step).random(int(stops.sum())) < self.sampling_ratio
            columns = cut_histories(self.dataset, users, stops, self.width, keep)
            lengths = columns["lengths"].numpy()
            columns = {name: values[mine] for name, values in columns.items()}
        else:
            columns = cut_histories(self.dataset, users[mine], stops[mine], self.width)
            lengths = np.minimum(stops, self.width)
        targets = np.maximum(lengths - 1, 0)
        before = targets[: bounds[0]]
        return LoadedBatch(columns, step, bounds[0], int(before.sum()), int(targets.sum()), int((before > 0).sum()))

    def _generator(self, epoch: int, purpose: int) -> np.random.Generator:
        # purpose 0 is the order of an epoch, 1 + step the sampling of a step: no state to save, whatever is resumed.
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, purpose])))


class EvaluationLoader:
    """Histories and targets of the users that have one, in user order; batches are the same for any number of
    processes.

    targets: ``[U]`` position of each user's target in the sequence, -1 for none. users: ``[n]`` those to take, rising;
    all that have a target unless given. Process r gets batches r, r + world_size, ... Adds ``target_ids``,
    ``next_timestamps`` and, for losses and metrics alone, the target's other columns as ``target_*``, all ``[B]``.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        targets: np.ndarray,
        max_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        users: np.ndarray | None = None,
    ) -> None:
        self.dataset, self.max_length = dataset, max_length
        self.targets = targets.astype(np.int64)
        self.users = np.flatnonzero(self.targets >= 0) if users is None else users
        starts = range(rank * batch_size, self.users.size, world_size * batch_size)
        self.batches = [self.users[start : start + batch_size] for start in starts]

    def leave_out(self, done: np.ndarray) -> None:
        """Leaves out batches of which all users are done; ``[U]`` bool. What is left is the same batches as before."""
        self.batches = [users for users in self.batches if not done[users].all()]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return map(self.batch, self.batches)

    def batch(self, users: np.ndarray) -> dict[str, torch.Tensor]:
        stops = self.targets[users]
        columns = cut_histories(self.dataset, users, stops, self.max_length)
        names = {"item_ids": "target_ids", "timestamps": "next_timestamps"}
        for name, values in event_values(self.dataset, self.dataset.offsets[users] + stops).items():
            columns[names.get(name, f"target_{name}")] = torch.from_numpy(values)
        return columns

    def histories(self, users: np.ndarray) -> Histories:
        """Everything that each of the users ``[B]`` (from 0) had before the target."""
        return Histories(self.dataset, users, self.targets[users])


class Histories:
    """Whole histories of a batch of users, event after event, read when asked for: ``histories["item_ids"]`` and the
    other columns of a batch are ``[T]``, without padding, so that one long history costs its own events alone.
    """

    def __init__(self, dataset: SequenceDataset, users: np.ndarray, stops: np.ndarray) -> None:
        self.dataset, self.users, self.stops = dataset, users, stops

    @cached_property
    def rows(self) -> torch.Tensor:
        """``[T]`` int64: the row of the batch that each event belongs to, rising."""
        return torch.from_numpy(np.repeat(np.arange(len(self.users)), self.stops))

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return event_values(self.dataset, consecutive(self.dataset.offsets[self.users], self.stops))

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._columns[name])


def prefetch(batches: Iterator, depth: int) -> Iterator:
    """The same batches, up to ``depth`` of them made ahead in a thread; errors are raised where they would have
    been."""
    if depth < 1:
        yield from batches
        return
    end = object()
    pool = ThreadPoolExecutor(1)  # one thread: the batches are made in their order
    try:
        waiting = deque(pool.submit(next, batches, end) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, batches, end))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
