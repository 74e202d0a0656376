"""Numbered rows: dropout masks that depend on a row's place in the global batch, not on which rows a process holds.

Within `opened` every source of masks (see `ops.dropout.KeepMasks`) draws by (key, number of the source, number
of the row). Sources are counted in the order of the forward pass, which is the same on every process. So N processes
drop what one process would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from generative_recommenders.ops.counter_random import Key, stream_key


@dataclass
class NumberedRows:
    """numbers: ``[n]`` int64, of the rows that are dropped from. items: ``[U]`` int64 ids of the scored items, or None.
    sources: how many sources were made so far."""

    key: Key
    numbers: torch.Tensor
    items: torch.Tensor | None = None
    sources: int = 0

    def next_key(self) -> Key:
        """The key of one more source."""
        self.sources += 1
        return stream_key(self.key, self.sources)

    def of(self, rows: int) -> torch.Tensor:
        """``[rows]`` numbers where each of the n rows became several, side by side."""
        several = rows // max(len(self.numbers), 1)
        if several == 1:
            return self.numbers
        numbers = self.numbers[:, None] * several + torch.arange(several, device=self.numbers.device)
        return numbers.flatten()


_open: list[NumberedRows] = []
"""Those in whose context the program is, the innermost last."""


def current() -> NumberedRows | None:
    return _open[-1] if _open else None


@contextlib.contextmanager
def opened(rows: NumberedRows) -> Iterator[None]:
    _open.append(rows)
    try:
        yield
    finally:
        _open.pop()


def of_items() -> AbstractContextManager[None]:
    """Rows are the scored items from here on, each by its id; nothing changes where rows are not numbered."""
    rows = current()
    if rows is None or rows.items is None:
        return contextlib.nullcontext()
    return opened(NumberedRows(rows.next_key(), rows.items))


def of_block(rows: slice, purpose: int) -> AbstractContextManager[None]:
    """Rows are a slice of the present ones. purpose: of the block, the same wherever else the rows are cut."""
    everything = current()
    if everything is None:
        return contextlib.nullcontext()
    return opened(NumberedRows(stream_key(everything.key, -1 - purpose), everything.numbers[rows]))


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a part of the forward pass, and of its repetition in the backward pass: the masks of both are one."""
    rows = current()
    if rows is None:
        return contextlib.nullcontext(), contextlib.nullcontext()
    return contextlib.nullcontext(), opened(replace(rows))
