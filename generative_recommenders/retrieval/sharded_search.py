"""Top-k over a catalogue that is sharded over processes: each searches its own items, and the best of all are merged."""

from __future__ import annotations

import torch

from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.selection import fill, largest


def search_shards(
    queries: torch.Tensor, items: torch.Tensor, k: int, shard: RowShard, seen_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_products` of the whole catalogue, on every process.

    queries: ``[n, D]``, the same on all. items: ``[v, D]``, those of this process. seen_ids: of the whole catalogue.
    """
    if seen_ids is not None:
        local = seen_ids - shard.before
        seen_ids = local.masked_fill((local < 1) | (local > len(items)), 0)
    values, ids = search_products(queries, items, min(k, len(items)), seen_ids)
    values, ids = fill(values, ids + shard.before, k)
    # Lower ranks hold smaller ids, so that ties are settled by column.
    every = [
        shard.collectives.gather_variable(each[None]).transpose(0, 1).flatten(1) for each in (values, ids)
    ]
    values, columns = largest(every[0], k)
    return fill(values, every[1].gather(1, columns), k)
