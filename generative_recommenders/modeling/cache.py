"""Incremental encoding: items appended to encoded histories, without encoding these again.

A causal encoder's state of a token never changes when later tokens arrive, so what later tokens need of it is kept:
keys and values of every block. HSTU's time bias makes one exception: the last token of a history is encoded with the
time of the event after it, which is known only when that event arrives, so this one token is encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.ops.jagged import jagged_to_padded
from generative_recommenders.ops.layout import Layout, jagged_layout


class KeysValues(NamedTuple):
    """Cache of one block for the tokens so far, right-padded: keys ``[B, C, H, dqk]``, values ``[B, C, H, dv]``."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class HistoryCache:
    """Encoded histories of B rows; a new one is made by every append, the old one stays as it was.

    lengths: ``[B]`` int64 on the CPU, the encoder's tokens so far.
    blocks: of the encoder, one each.
    times: ``[B, C]`` int64 seconds of all items, or None.
    last_input, last_output: ``[B, E]`` and ``[B, D]``, what the encoder took and gave at each row's last item.
    last_events: ``[B]`` columns, the events of that item.
    """

    lengths: torch.Tensor
    blocks: tuple[KeysValues, ...]
    times: torch.Tensor | None
    last_input: torch.Tensor
    last_output: torch.Tensor
    last_events: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Appended:
    """The tokens that an append computes.

    layout: of these tokens alone; their positions count from the beginning of the history.
    capacity: C, tokens of the longest history afterwards.
    times: ``[B, C]`` int64 seconds of all tokens, or None.
    """

    layout: Layout
    capacity: int
    times: torch.Tensor | None = None

    def extend(self, cached: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """``[B, C, ...]``: the cached rectangle with the tokens ``new [T, ...]`` at their positions."""
        # A new rectangle: the cache before stays as it was, for other continuations of the same history.
        grown = new.new_zeros(self.layout.num_rows, self.capacity, *new.shape[1:])
        if cached is not None:
            grown[:, : cached.shape[1]] = cached
        grown[self.layout.row_of, self.layout.positions] = new
        return grown

    def extend_block(self, cached: KeysValues | None, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """k: ``[T, H, dqk]``; v: ``[T, H, dv]``."""
        keys, values = cached or (None, None)
        return KeysValues(self.extend(keys, k), self.extend(values, v))

    def heads_first(self, q: torch.Tensor) -> torch.Tensor:
        """``[T, H, d]`` as ``[B, H, M, d]``."""
        return self.layout.to_rectangle(q).transpose(1, 2)

    def distances(self) -> torch.Tensor:
        """``[B, M, C]`` int64: column minus position, above 0 for what lies in a token's future."""
        columns = torch.arange(self.capacity, device=self.layout.device)
        return columns - self.layout.to_rectangle(self.layout.positions)[:, :, None]


@runtime_checkable
class IncrementalEncoder(Protocol):
    """An encoder that can append."""

    output_dim: int

    def revises_last(self, events: Mapping[str, torch.Tensor]) -> bool:
        """Whether the last token of a history changes when the event after it arrives."""

    def encode_appended(
        self,
        x: torch.Tensor,
        events: Mapping[str, torch.Tensor],
        appended: Appended,
        cached: Sequence[KeysValues],
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """``[T, E]`` to ``[T, D]`` and the extended blocks; cached is empty at the beginning. UserError where options
        of the encoder make every token depend on later ones."""


def agrees_with_forward(module: torch.nn.Module, *methods: str) -> bool:
    """Whether a module has these methods, and none from a class whose ``forward`` a derived one replaced: the numbers
    may then be others."""
    kinds = type(module).__mro__

    def place(name: str) -> int:
        return next((n for n, kind in enumerate(kinds) if name in vars(kind)), len(kinds))

    return all(place(name) <= place("forward") for name in methods)


def last_tokens(layout: Layout, times: torch.Tensor | None = None) -> tuple[torch.Tensor, Appended]:
    """The last token of each row that has one, ``[R]`` int64 among those of a jagged layout, and the same as appended
    to all before it. times: ``[T]`` int64 seconds, or None.
    """
    lengths = layout.lengths.cpu()
    one = lengths.clamp(max=1)
    capacity = max(layout.longest, 1)
    held = None if times is None else jagged_to_padded(times, layout.offsets, capacity)
    appended = Appended(new_layout(lengths - one, one, layout.device), capacity, held)
    return layout.last_tokens[layout.lengths > 0], appended


def softmax_over_cache(q: torch.Tensor, block: KeysValues, appended: Appended) -> torch.Tensor:
    """Causal softmax(q kᵀ / sqrt(d)) v of the computed tokens; q: ``[T, H, d]``; returns ``[T, H, dv]``."""
    sees = (appended.distances() <= 0)[:, None]
    keys, values = block.keys.transpose(1, 2), block.values.transpose(1, 2)
    # Few queries against many keys: no tiles are worth it here.
    out = F.scaled_dot_product_attention(appended.heads_first(q), keys, values, sees)
    return appended.layout.flatten(out.transpose(1, 2))


def pointwise_over_cache(
    q: torch.Tensor, block: KeysValues, appended: Appended, bias: torch.Tensor | None, divisor: float
) -> torch.Tensor:
    """Causal SiLU(q kᵀ + bias) / divisor · v of the computed tokens; bias: ``[B, 1, M, C]`` or None."""
    scores = appended.heads_first(q) @ block.keys.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    sees = (appended.distances() <= 0)[:, None]
    weights = F.silu(scores) * sees / divisor
    return appended.layout.flatten((weights @ block.values.transpose(1, 2)).transpose(1, 2))


def append_tokens(
    encoder: IncrementalEncoder,
    cache: HistoryCache | None,
    x: torch.Tensor,
    layout: Layout,
    events: Mapping[str, torch.Tensor],
) -> HistoryCache:
    """The cache after the tokens ``x [T, E]`` of a jagged layout, with events ``[T]``, were appended.

    Rows of the layout may be empty. UserError where the events are not those that the cache was made with.
    """
    rows = layout.num_rows
    old = cache or HistoryCache(
        lengths=torch.zeros(rows, dtype=torch.int64),
        blocks=(),
        times=None,
        last_input=x.new_zeros(rows, x.shape[1]),
        last_output=x.new_zeros(rows, encoder.output_dim),
        last_events={name: values.new_zeros(rows) for name, values in events.items()},
    )
    if set(events) != set(old.last_events):
        names = [", ".join(sorted(each)) or "none" for each in (old.last_events, events)]
        raise UserError(
            f"encode_incremental: the histories were encoded with events {names[0]} and the new items come with "
            f"{names[1]}: give the same"
        )
    # Rows whose last old token is computed again, in front of their new ones: a stable sort by row merges the two.
    again = (old.lengths > 0) & encoder.revises_last(events)
    revised = again.nonzero()[:, 0].to(layout.device)
    order = torch.cat([revised, layout.row_of]).argsort(stable=True)

    def merged(last: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([last[revised].to(new.dtype), new])[order]

    x = merged(old.last_input, x)
    tokens = {name: merged(old.last_events[name], values) for name, values in events.items()}
    lengths, computed = old.lengths + layout.lengths.cpu(), layout.lengths.cpu() + again
    layout = new_layout(old.lengths - again.long(), computed, layout.device)
    appended = Appended(layout, _longest(lengths))
    if "timestamps" in tokens:
        appended = replace(appended, times=appended.extend(old.times, tokens["timestamps"]))
    output, blocks = encoder.encode_appended(x, tokens, appended, old.blocks)
    return HistoryCache(
        lengths,
        blocks,
        appended.times,
        _at_end(layout, x, old.last_input),
        _at_end(layout, output, old.last_output),
        {name: _at_end(layout, v, old.last_events[name]) for name, v in tokens.items()},
    )


def new_layout(encoded: torch.Tensor, new_lengths: torch.Tensor, device: torch.device) -> Layout:
    """The jagged layout of new items alone, with positions that continue from the ``encoded [B]`` items of each
    history."""
    layout = jagged_layout(new_lengths, _longest(new_lengths), device)
    return replace(layout, positions=layout.positions + encoded.to(device)[layout.row_of])


def check_append(encoded: torch.Tensor, new_lengths: torch.Tensor, columns: int, window: int) -> None:
    """UserError where the rows are not those of the ``encoded [B]`` histories, or one has more new items than columns,
    or would outgrow the window."""
    lengths = new_lengths.cpu()
    if encoded.shape != lengths.shape:
        raise UserError(
            f"encode_incremental: the cache holds {encoded.numel()} rows and new_lengths "
            f"{lengths.numel()}: append to all of them, 0 items where there is none"
        )
    if _longest(lengths) > columns:
        raise UserError(
            f"encode_incremental: row {int(lengths.argmax())} has {int(lengths.max())} new items and new_ids {columns} "
            "columns: widen new_ids, or shorten new_lengths"
        )
    lengths = lengths + encoded
    if _longest(lengths) > window:
        raise UserError(
            f"encode_incremental: row {int(lengths.argmax())} would hold {int(lengths.max())} items and the window "
            f"holds {window}: encode its latest {window} items anew"
        )


def _longest(lengths: torch.Tensor) -> int:
    return max(lengths.tolist(), default=0)


def _at_end(layout: Layout, values: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``[B, ...]``: the value at each row's last computed token, the old one in rows without any."""
    rows = (layout.lengths > 0).nonzero()[:, 0]
    return old.index_put((rows,), values[layout.last_tokens[rows]].to(old.dtype))
