"""Exact search by dot product, which on a CPU costs little more than the products themselves.

There a block of scores stays in the cache. Its columns are dealt to lanes, and only lanes whose maximum beats the worst
of a query's k best so far are looked at: after the first blocks these are few.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.modeling.similarity.interface import rounded
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.threads import in_threads
from generative_recommenders.retrieval.selection import fill, largest, scan

BLOCK_SCORES = 1 << 20
"""Scores held at a time: 4 MiB, which second-level caches hold."""
BLOCK_ROWS = 512
FEWEST_ROWS = 100
"""Queries a core, at least, where every core has blocks of its own: with fewer, products shared out by torch are
faster."""
LANES = 64
"""Lanes of a block: items ``c, c + LANES, c + 2 LANES, ...`` are lane c."""


@torch.no_grad()
def search_products(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    seen_ids: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids ``[n, k]`` of the k largest products of ``queries [n, D]`` with ``items [V, D]``, as
    `selection.scan`.

    seen_ids: ``[n, S]`` int64, padded with 0: items left out of a row. dtype: what products are rounded to, see
    `Similarity`.
    """
    if not dispatch.fast_on_cpu(queries):
        block = max(1, 8 * BLOCK_SCORES // max(1, len(queries)))
        return scan(lambda start, stop: rounded(queries @ items[start:stop].T, dtype), len(items), k, block, seen_ids)
    values = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.zeros(len(queries), k, dtype=torch.int64)
    if not len(items):
        return values, ids
    cores = torch.get_num_threads()
    apart = cores > 1 and len(queries) >= FEWEST_ROWS * cores
    parts = cores * -(-len(queries) // (cores * BLOCK_ROWS)) if apart else -(-len(queries) // BLOCK_ROWS)
    rows = max(1, -(-len(queries) // max(1, parts)))
    lanes = min(LANES * max(1, BLOCK_ROWS // (8 * rows)), len(items))  # few rows: more, shorter lanes
    width = max(1, BLOCK_SCORES // (rows * lanes)) * lanes

    def search(some: slice) -> None:
        buffer = queries.new_empty(rows, min(width, -(-len(items) // lanes) * lanes))
        seen = None if seen_ids is None else seen_ids[some]
        _search(queries[some], items, lanes, buffer, seen, dtype, _Best(values[some], ids[some]))

    blocks = [slice(start, start + rows) for start in range(0, len(queries), rows)]
    if apart:
        in_threads(search, blocks)
    else:
        for some in blocks:
            search(some)
    return values, ids.masked_fill_(values == -torch.inf, 0)


def search_shards(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    shard: RowShard,
    seen_ids: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_products` of the whole catalogue, on every process.

    queries: ``[n, D]``, the same on all. items: ``[v, D]``, those of this process. seen_ids: of the whole catalogue.
    """
    if seen_ids is not None:
        local = seen_ids - shard.before
        seen_ids = local.masked_fill((local < 1) | (local > len(items)), 0)
    values, ids = search_products(queries, items, min(k, len(items)), seen_ids, dtype)
    values, ids = fill(values, ids + shard.before, k)
    # Lower ranks hold smaller ids, so that ties are settled by column.
    every = [shard.collectives.gather_variable(each[None]).transpose(0, 1).flatten(1) for each in (values, ids)]
    values, columns = largest(every[0], k)
    return fill(values, every[1].gather(1, columns), k)


def _search(
    queries: torch.Tensor,
    items: torch.Tensor,
    lanes: int,
    buffer: torch.Tensor,
    seen_ids: torch.Tensor | None,
    dtype: torch.dtype | None,
    best: _Best,
) -> None:
    width = buffer.shape[1]
    if seen_ids is not None:  # for each block, its rows and columns of seen items
        rows, places = ((seen_ids > 0) & (seen_ids <= len(items))).nonzero(as_tuple=True)
        columns, order = (seen_ids[rows, places] - 1).sort()
        rows = rows[order]
        starts = torch.arange(0, len(items) + width, width)
        bounds = torch.searchsorted(columns, starts).tolist()
        seen = ((rows[a:b], columns[a:b] % width) for a, b in pairwise(bounds))
    for start in range(0, len(items), width):
        count = min(width, len(items) - start)
        scores = buffer[: len(queries), : -(-count // lanes) * lanes]
        torch.mm(queries, items[start : start + count].T, out=scores[:, :count])
        if dtype is not None:
            scores.copy_(scores.to(dtype))
        scores[:, count:] = -torch.inf
        if seen_ids is not None:
            scores[next(seen)] = -torch.inf
        maxima = scores.unflatten(1, (-1, lanes)).amax(1)
        # A NaN is the maximum of its lane: one look at few maxima finds those of all scores.
        if maxima.isnan().any():
            scores.masked_fill_(scores.isnan(), -torch.inf)
            maxima = scores.unflatten(1, (-1, lanes)).amax(1)
        best.add(scores, maxima, start)
    best.merge()


class _Best:
    """The best of the blocks so far, ``values`` and ``ids [r, k]``, best first, which are written to.

    What beats a row's worst is collected, and merged when it has become much: late blocks bring little.
    """

    def __init__(self, values: torch.Tensor, ids: torch.Tensor) -> None:
        self.values, self.ids = values, ids
        self.pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.num_pending = 0

    def add(self, scores: torch.Tensor, maxima: torch.Tensor, start: int) -> None:
        """A block of ``scores [r, c]``, whose lanes have ``maxima [r, lanes]``."""
        k, lanes = self.values.shape[1], maxima.shape[1]
        if start == 0 and k > lanes:
            best, columns = largest(scores, k)
            self.values[:, : best.shape[1]], self.ids[:, : best.shape[1]] = best, columns + 1
            return
        if start == 0:  # k lanes reach this: so do k items
            bound = maxima.topk(k, dim=1).values[:, -1:]
            row, lane = (maxima >= bound).nonzero(as_tuple=True)
            cells = scores.unflatten(1, (-1, lanes))[row, :, lane]
            which, place = (cells >= bound[row]).nonzero(as_tuple=True)
        else:  # an equal score of a larger id comes after those that are held
            bound = self.values[:, -1:]
            row, lane = (maxima > bound).nonzero(as_tuple=True)
            cells = scores.unflatten(1, (-1, lanes))[row, :, lane]
            which, place = (cells > bound[row]).nonzero(as_tuple=True)
        if len(which):
            self.pending.append((row[which], place * lanes + lane[which] + (start + 1), cells[which, place]))
            self.num_pending += len(which)
        if start == 0 or self.num_pending > self.values.numel() // 4:
            self.merge()

    def merge(self) -> None:
        if not self.pending:
            return
        row, item, score = (torch.cat(parts) for parts in zip(*self.pending))
        self.pending, self.num_pending = [], 0
        # By item, then stably by row: `largest` breaks ties by column.
        order = item.argsort()
        order = order[row[order].argsort(stable=True)]
        row, item, score = row[order], item[order], score[order]
        rows, counts = row.unique_consecutive(return_counts=True)
        most = int(counts.max())
        first = torch.arange(len(rows)) * most - (counts.cumsum(0) - counts)
        cell = torch.arange(len(row)) + first.repeat_interleave(counts)
        scores = self.values.new_full((len(rows) * most,), -torch.inf).scatter_(0, cell, score).view(-1, most)
        items = self.ids.new_zeros(len(rows) * most).scatter_(0, cell, item).view(-1, most)
        best, place = largest(torch.cat([self.values[rows], scores], dim=1), self.values.shape[1])
        self.values[rows] = best
        self.ids[rows] = torch.cat([self.ids[rows], items], dim=1).gather(1, place)
