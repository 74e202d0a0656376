"""Groups of rows that attend together, and the steps in which a causal group is computed.

The rows of a group are padded to its longest. Where all is causal a group is cut into steps, and a row takes part in
those that it reaches; where it is not, the rows of a group have similar lengths. A padded layout is one group of all
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from generative_recommenders.ops.rectangles import Places, Rectangles, places, places_of_all

GROUP_CELLS = 8_000_000
"""Cells of a group's attention matrix (rows times width squared), at most: a bound on memory."""

MAX_WASTE = 0.15
"""Share of the cells that may be padding in a group that is not causal, beyond MIN_ROWS rows."""

MIN_ROWS = 4
"""Rows that share a rectangle whatever their lengths."""

STEP_COST = 40_000
"""Cost of a step of a group beside its cells, in cells."""

MAX_CUTS = 25
"""Places where a group may be cut into steps."""


class Step(NamedTuple):
    """Queries start..stop of a group's first ``rows`` rows, against the keys up to stop; other rows end before
    start."""

    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Group:
    """Rows attended together.

    width: columns n of the group's rectangle.
    keys: one rectangle ``[g, n]``.
    queries: a rectangle for each step, or the same as the keys where not all is causal.
    lengths: ``[g]`` int64, real cells a row; of a jagged layout the longest first.
    steps: what a causal attention computes, from the first query to the last.
    """

    width: int
    keys: Rectangles
    queries: Rectangles
    lengths: torch.Tensor
    steps: tuple[Step, ...]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` tokens as the group's rectangle ``[g, n, ...]``."""
        return x.index_select(0, self.keys.tokens).view(self.lengths.shape[0], self.width, *x.shape[1:])

    def real(self) -> torch.Tensor:
        """``[g, n]`` bool, False past a row's end."""
        return self.keys.real.view(self.lengths.shape[0], self.width)


class Grouping(NamedTuple):
    """Rectangles for attention, which together cover every token once, and where the tokens lie among the keys and
    among the queries of all groups."""

    groups: tuple[Group, ...]
    keys: Places
    queries: Places


def groups_of_rows(lengths: np.ndarray, causal: bool) -> Grouping:
    """The groups of a jagged layout, on the CPU. lengths: ``[B]`` int64."""
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups: list[Group] = []
    first = 0
    while first < order.size:
        width = int(lengths[order[first]])
        fits = max(MIN_ROWS, GROUP_CELLS // width**2)
        if not causal:
            # Every cell of the rectangle is computed: as many rows, from the longest on, as waste little.
            used = np.cumsum(lengths[order[first : first + fits]])
            thrifty = used >= (1.0 - MAX_WASTE) * width * np.arange(1, used.size + 1)
            fits = max(MIN_ROWS, int(np.flatnonzero(thrifty)[-1]) + 1)
        rows = order[first : first + fits]
        own = lengths[rows]
        columns = np.arange(width)
        # cells past a row's end hold its last token: finite numbers, which no real query attends to
        tokens = (starts[rows][:, None] + np.minimum(columns, own[:, None] - 1)).astype(np.int32)
        cells = torch.from_numpy(tokens), torch.from_numpy(columns < own[:, None])
        steps, keys = _steps(own), _cut(*cells, _whole(*tokens.shape))
        queries = _cut(*cells, steps) if causal else keys
        groups.append(Group(width, keys, queries, torch.from_numpy(own), steps))
        first += rows.size
    found = places([group.keys for group in groups], int(lengths.sum()))
    queried = places([group.queries for group in groups], int(lengths.sum())) if causal else found
    return Grouping(tuple(groups), found, queried)


def groups_of_rectangle(lengths: torch.Tensor, valid: torch.Tensor, causal: bool) -> Grouping:
    """The one group of a padded layout, cut into steps where all is causal. lengths: ``[B]``; valid: ``[B, N]``
    bool."""
    (rows, width), device = valid.shape, valid.device
    known = isinstance(rows, int) and isinstance(width, int)  # an exporter's sizes are symbols
    steps = _steps(np.full(rows, width)) if known else _whole(rows, width)
    tokens = torch.arange(rows * width, dtype=torch.int32, device=device).view(rows, width)
    keys = _cut(tokens, valid, _whole(rows, width))
    queries = _cut(tokens, valid, steps) if causal else keys
    group = Group(width, keys, queries, lengths, steps)
    if not known:
        every = Places(keys.tokens, torch.arange(rows + 1, dtype=torch.int32, device=device) * width)
        return Grouping((group,), every, every)
    key_places = places_of_all(keys)
    return Grouping((group,), key_places, places_of_all(queries) if causal else key_places)


def _whole(rows: int, columns: int) -> tuple[Step, ...]:
    return (Step(0, columns, rows),)


def _cut(tokens: torch.Tensor, real: torch.Tensor, steps: tuple[Step, ...]) -> Rectangles:
    """The parts of a group's ``tokens [g, n]`` that are queries of its steps; real: ``[g, n]``."""
    cut = [torch.cat([x[:rows, start:stop].flatten() for start, stop, rows in steps]) for x in (tokens, real)]
    return Rectangles(tuple((rows, stop - start) for start, stop, rows in steps), *cut)


def _steps(lengths: np.ndarray) -> tuple[Step, ...]:
    """Cuts a group whose rows have these lengths, longest first, so that cells and steps cost least (a shortest
    path)."""
    if not lengths.size:
        return ()
    width = int(lengths[0])
    cuts = np.append(np.arange(0, width, -(-width // MAX_CUTS)), width)
    reaching = np.searchsorted(-lengths, -cuts)
    least, before = np.zeros(cuts.size), np.zeros(cuts.size, np.int64)
    for i in range(1, cuts.size):
        # the last step of the cheapest way to cut i, from every cut before: its cells up to i, and its calls
        costs = least[:i] + reaching[:i] * (cuts[i] - cuts[:i]) * cuts[i] + STEP_COST
        before[i] = costs.argmin()
        least[i] = costs[before[i]]
    steps, i = [], cuts.size - 1
    while i:
        start = before[i]
        steps.append(Step(int(cuts[start]), int(cuts[i]), int(reaching[start])))
        i = start
    return tuple(reversed(steps))
