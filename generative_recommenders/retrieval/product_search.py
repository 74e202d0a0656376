"""Exact search by dot product, which on a CPU costs little more than the products themselves.

There a block of scores stays in the cache. Its columns are dealt to lanes, and only lanes whose maximum beats the worst of a
query's k best so far are looked at: after the first blocks these are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.retrieval.selection import largest, scan

BLOCK_SCORES = 1 << 20
"""Scores held at a time: 4 MiB, which second-level caches hold."""
BLOCK_ROWS = 512
LANES = 512
"""Lanes of a block: items ``c, c + LANES, c + 2 LANES, ...`` are lane c."""


@torch.no_grad()
def search_products(
    queries: torch.Tensor, items: torch.Tensor, k: int, seen_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids ``[n, k]`` of the k largest products of ``queries [n, D]`` with ``items [V, D]``, as `selection.scan`.

    seen_ids: ``[n, S]`` int64, padded with 0: items left out of a row.
    """
    if not dispatch.fast_on_cpu(queries):
        block = max(1, 8 * BLOCK_SCORES // max(1, len(queries)))
        return scan(lambda start, stop: queries @ items[start:stop].T, len(items), k, block, seen_ids)
    values = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.zeros(len(queries), k, dtype=torch.int64)
    if not len(items):
        return values, ids
    rows = min(BLOCK_ROWS, max(1, len(queries)))
    lanes = min(LANES * max(1, BLOCK_ROWS // (8 * rows)), len(items))
    width = max(1, BLOCK_SCORES // (rows * lanes)) * lanes
    buffer = queries.new_empty(rows, min(width, -(-len(items) // lanes) * lanes))
    for start in range(0, len(queries), rows):
        some = slice(start, start + rows)
        seen = None if seen_ids is None else seen_ids[some]
        _search(queries[some], items, lanes, buffer, seen, values[some], ids[some])
    return values, ids.masked_fill_(values == -torch.inf, 0)


def _search(
    queries: torch.Tensor,
    items: torch.Tensor,
    lanes: int,
    buffer: torch.Tensor,
    seen_ids: torch.Tensor | None,
    values: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """Fills values and ids ``[r, k]``, which hold no item yet."""
    width = buffer.shape[1]
    seen = _seen_by_block(seen_ids, len(items), width)
    for start in range(0, len(items), width):
        count = min(width, len(items) - start)
        scores = buffer[: len(queries), : -(-count // lanes) * lanes]
        torch.mm(queries, items[start : start + count].T, out=scores[:, :count])
        scores[:, count:] = -torch.inf
        if seen is not None:
            scores[next(seen)] = -torch.inf
        maxima = scores.unflatten(1, (-1, lanes)).amax(1)
        if maxima.isnan().any():
            scores.masked_fill_(scores.isnan(), -torch.inf)
            maxima = scores.unflatten(1, (-1, lanes)).amax(1)
        _take_best(scores, maxima, start, values, ids)


def _take_best(
    scores: torch.Tensor, maxima: torch.Tensor, start: int, values: torch.Tensor, ids: torch.Tensor
) -> None:
    """Brings the best of a block (``scores [r, c]`` with their lanes' ``maxima``) into values and ids ``[r, k]``."""
    k, lanes = values.shape[1], maxima.shape[1]
    worst = values[:, -1]
    if start == 0 and k <= lanes:  # k lanes reach this: so do k items
        bound = maxima.topk(k, dim=1).values[:, -1]
        found = maxima >= bound[:, None]
    else:  # an equal score of a larger id comes after those that are held
        bound = worst
        found = maxima > worst[:, None]
    row, lane = found.nonzero(as_tuple=True)
    if not len(row):
        return
    cells = scores.unflatten(1, (-1, lanes))[row, :, lane]
    which, place = (cells >= bound[row, None]).nonzero(as_tuple=True)
    found_row, column = row[which], place * lanes + lane[which]
    order = (found_row * scores.shape[1] + column).argsort()
    found_row, column, score = found_row[order], column[order], cells[which, place][order]
    rows, counts = found_row.unique_consecutive(return_counts=True)
    most = int(counts.max())
    first = torch.arange(len(rows)) * most - (counts.cumsum(0) - counts)
    cell = torch.arange(len(found_row)) + first.repeat_interleave(counts)
    new_values = values.new_full((len(rows) * most,), -torch.inf).scatter_(0, cell, score).view(-1, most)
    new_ids = ids.new_zeros(len(rows) * most).scatter_(0, cell, column + (start + 1)).view(-1, most)
    best, place = largest(torch.cat([values[rows], new_values], dim=1), k)
    values[rows] = best
    ids[rows] = torch.cat([ids[rows], new_ids], dim=1).gather(1, place)


def _seen_by_block(
    seen_ids: torch.Tensor | None, num_items: int, width: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]] | None:
    """For each block, the rows and columns of seen items ``[r, S]``."""
    if seen_ids is None:
        return None
    rows, places = ((seen_ids > 0) & (seen_ids <= num_items)).nonzero(as_tuple=True)
    columns, order = (seen_ids[rows, places] - 1).sort()
    rows = rows[order]
    starts = torch.arange(0, num_items + width, width)
    bounds = torch.searchsorted(columns, starts).tolist()
    return ((rows[a:b], columns[a:b] % width) for a, b in pairwise(bounds))
