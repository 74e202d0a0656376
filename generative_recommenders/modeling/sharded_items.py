"""Item embeddings whose table is sharded by rows over the processes of a run.

A step gets the rows it reads from the processes that hold them, once, and sends their gradients back; each process
updates its own rows. Losses over the catalogue are computed where each shard lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from generative_recommenders.config.fields import Positive
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.row_shards import Route, RowShard
from generative_recommenders.distributed.torchrec_table import TorchRecTable
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.initialization import drawn_rows
from generative_recommenders.modeling.items import ItemEmbedding, ItemRows
from generative_recommenders.ops.embedding import sorted_unique


@dataclass(frozen=True, kw_only=True)
class ShardRows(ItemRows):
    """All rows of this process's shard, in order."""

    shard: RowShard

    def catalogue(self) -> torch.Tensor:
        """``[v, D]``: row i belongs to item id ``shard.before + i + 1``."""
        return self.weight[1:] if self.shard.first == 0 else self.weight


@dataclass(frozen=True, kw_only=True)
class RoutedRows(ItemRows):
    """Rows gathered from all shards, and beside them the shard itself, a leaf of its own."""

    route: Route
    own: ShardRows


class ShardedItemEmbedding(ItemEmbedding):
    """One trained row per item, of which each process holds a part; ``table [stop - first, D]``, see `RowShard`.

    Its initial numbers are those of an unsharded table.
    """

    shard: RowShard

    def __init__(
        self,
        num_items: int,
        embedding_dim: int,
        collectives: Collectives,
        *,
        item_l2_norm: bool = False,
        l2_norm_eps: Positive = 1e-6,
    ) -> None:
        self.shard = RowShard(1 + num_items, collectives)
        super().__init__(num_items, embedding_dim, item_l2_norm=item_l2_norm, l2_norm_eps=l2_norm_eps)

    def initial_table(self, num_rows: int, std: float = 0.02) -> torch.Tensor:
        return drawn_rows(num_rows, self.embedding_dim, std, self.shard.first, self.shard.stop)

    def step_rows(self, row_ids: torch.Tensor | None) -> ItemRows:
        assert row_ids is not None  # a task with a sharded table always gathers
        route = self.shard.route(row_ids)
        learns = self.table.requires_grad
        gathered = self.shard.gather(self.table, route).requires_grad_(learns)
        own = ShardRows(self.table.detach().requires_grad_(learns), shard=self.shard)
        return RoutedRows(gathered, row_ids, late=[], route=route, own=own)

    def catalogue_rows(self, rows: ItemRows) -> ItemRows:
        assert isinstance(rows, RoutedRows)
        return rows.own

    def rows(self, item_ids: torch.Tensor) -> ItemRows:
        ids = sorted_unique(item_ids, self.num_items)
        return ItemRows(self.shard.gather(self.table, self.shard.route(ids)), ids)

    def all_rows(self) -> ItemRows:
        raise UserError(
            "the item table is sharded over processes: only the program's own training step and evaluation work on it"
        )

    def all_item_embeddings(self) -> torch.Tensor:
        """``[v, D]``, those of this process's items: row i belongs to item id ``shard.before + i + 1``."""
        return self.scored_rows(ShardRows(self.table, shard=self.shard), None).catalogue()

    def gradients(self, rows: ItemRows, world_size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of this process's rows, summed over processes: their numbers in the shard (None: all) and gradients
        ``[U, D]``."""
        assert isinstance(rows, RoutedRows)
        if not rows.weight.requires_grad:
            return None, None
        gathered = rows.gradient()
        # A loss over the catalogue may read no history of this process.
        sent = torch.zeros_like(rows.weight) if gathered is None else gathered / world_size
        ids, sums = self.shard.sums(sent, rows.route)
        whole = rows.own.weight.grad
        return (ids, sums) if whole is None else (None, whole.div_(world_size).index_add_(0, ids, sums))


class TorchRecItemEmbedding(ShardedItemEmbedding):
    """A sharded table whose rows TorchRec stores, exchanges and updates, by row-wise Adagrad in its backward pass.

    The numbers are those of `ShardedItemEmbedding` with that optimizer. Only gathered rows are scored, not the shard.
    """

    kept: TorchRecTable

    def initial_table(self, num_rows: int, std: float = 0.02) -> torch.Tensor:
        self.kept = TorchRecTable(num_rows, self.embedding_dim, self.shard.collectives)
        return self.kept.weight.copy_(super().initial_table(num_rows, std))

    def step_rows(self, row_ids: torch.Tensor | None) -> ItemRows:
        assert row_ids is not None  # a task with a sharded table always gathers
        learns = self.table.requires_grad
        gathered = self.kept.lookup(row_ids, learns=learns).requires_grad_(learns)
        return ItemRows(gathered, row_ids, late=[])

    def rows(self, item_ids: torch.Tensor) -> ItemRows:
        ids = sorted_unique(item_ids, self.num_items)
        return ItemRows(self.kept.lookup(ids), ids)

    def gradients(self, rows: ItemRows, world_size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """This process's part of the gradients of the rows that it read, which `TorchRecTable.update` sums over
        processes."""
        if not rows.weight.requires_grad:
            return None, None
        gathered = rows.gradient()
        assert gathered is not None  # a sampled loss reads histories
        return rows.ids, gathered / world_size
