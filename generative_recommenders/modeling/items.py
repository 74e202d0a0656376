"""Item embeddings: the table that histories look up and candidates are scored with.

A step knows the ids it reads before its forward pass. `ItemRows` is what it works on: the gathered rows of those ids,
one leaf to differentiate, so that the cost of a step does not grow with the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from generative_recommenders.config.fields import Positive
from generative_recommenders.config.registry import register_item_embedding
from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.distributed.torchrec_table import TorchRecTable
from generative_recommenders.modeling.initialization import truncated_normal_
from generative_recommenders.ops.embedding import LateGradients, lookup_rows, places_of, sorted_unique
from generative_recommenders.ops.normalization import l2_normalize


@dataclass(frozen=True)
class ItemRows:
    """Embeddings of some items.

    weight: ``[U, D]``. ids: ``[U]`` int64 ids of those rows, as of `ops.embedding.sorted_unique`, or None when
    ``weight`` holds 0..V in order.
    row_of_item: ``[V + 1]`` int64, the id that an item's row goes by, or None where it is the item's own id.
    norm_eps: lower bound of the norm that ``weight`` is divided by when items are scored; None for no normalisation.
    late: of a leaf, gradients of lookups that `gradient` adds to that of ``weight``.
    """

    weight: torch.Tensor
    ids: torch.Tensor | None = None
    row_of_item: torch.Tensor | None = None
    norm_eps: float | None = None
    late: LateGradients | None = None

    def index(self, item_ids: torch.Tensor) -> torch.Tensor:
        """Rows of ``weight`` for item ids of any shape, all of which must be held."""
        ids = item_ids if self.row_of_item is None else self.row_of_item[item_ids]
        return ids if self.ids is None else places_of(self.ids, ids)

    def lookup(self, item_ids: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` embeddings of ``item_ids [...]``."""
        return lookup_rows(self.weight, self.index(item_ids), self.late if self.weight.is_leaf else None)

    def gradient(self) -> torch.Tensor | None:
        """``[U, D]``, of the leaf after the backward pass; None where nothing reached it."""
        if not self.late:
            return self.weight.grad
        total = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        for rows, gradients in self.late:
            total.index_add_(0, rows, gradients)
        return total

    def normalized(self) -> ItemRows:
        """The rows as they are scored; in full precision where they are normalised."""
        if self.norm_eps is None:
            return self
        return replace(self, weight=l2_normalize(self.weight.float(), self.norm_eps), norm_eps=None)

    def catalogue(self) -> torch.Tensor:
        """``[V, D]``: row i belongs to item id i + 1. Only where all items are held."""
        if self.ids is not None:
            raise ValueError(f"{len(self.ids)} rows are held, not those of the whole catalogue")
        return self.weight[1:] if self.row_of_item is None else lookup_rows(self.weight, self.row_of_item[1:])


class ItemEmbedding(torch.nn.Module):
    """Items as samplers, losses, index and evaluator see them. Ids are 1..V; 0 is padding.

    ``embed_history`` is what a history looks up and ``get_item_embeddings`` what is scored; they differ only where an
    item tower computes the latter. ``table [rows, D]`` is the one large parameter of which a step reads few rows: a
    training step differentiates ``history_rows`` and ``scored_rows``, both made from a leaf that holds the gathered
    rows of the table. ``tower`` is the dense network that computes scored embeddings, where there is one.

    item_l2_norm: scored embeddings are divided by max(norm, l2_norm_eps).
    l2_norm_eps: lower bound of the norm that is divided by.
    """

    SUPPLIED = frozenset({"num_items", "embedding_dim", "num_rows", "item_category"})
    """Passed by the program where a constructor asks for it; all other arguments are options."""
    tower: torch.nn.Module | None

    def __init__(
        self,
        num_items: int,
        embedding_dim: int,
        num_rows: int | None = None,
        *,
        item_l2_norm: bool = False,
        l2_norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.embedding_dim = embedding_dim
        self.item_l2_norm, self.l2_norm_eps = item_l2_norm, l2_norm_eps
        self.tower = None
        self.table = torch.nn.Parameter(self.initial_table(1 + (num_rows or num_items), std=0.02))

    shard: RowShard | None = None
    """The rows that this process holds of a table that is sharded; None where the table is whole."""
    kept: TorchRecTable | None = None
    """TorchRec's table, where TorchRec stores and updates the rows."""

    def initial_table(self, num_rows: int, std: float = 0.02) -> torch.Tensor:
        """The table at the start of training."""
        return truncated_normal_(torch.empty(num_rows, self.embedding_dim), std)

    def step_rows(self, row_ids: torch.Tensor | None) -> ItemRows:
        """Rows of the table (None: all), the leaf that a training step differentiates."""
        # A leaf of its own, so that its gradient is as large as the rows that are read, not as the table. Lookups fill
        # ``late`` in the backward pass.
        table = self.table.detach()
        weight = table if row_ids is None else table.index_select(0, row_ids)
        return ItemRows(weight.requires_grad_(self.table.requires_grad), row_ids, late=[])

    def rows(self, item_ids: torch.Tensor) -> ItemRows:
        """Rows of the table, at least those of ``item_ids`` (any shape)."""
        return self.all_rows()

    def all_rows(self) -> ItemRows:
        """The whole table."""
        return ItemRows(self.table)

    def catalogue_rows(self, rows: ItemRows) -> ItemRows:
        """Inputs of a loss over the catalogue, of a step's rows."""
        return rows

    def table_rows(self, item_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table that belong to the items; both as of `ops.embedding.sorted_unique`."""
        return item_ids

    def history_rows(self, leaf: ItemRows) -> ItemRows:
        """Input embeddings of histories, from the gathered table rows."""
        return leaf

    def raw_rows(self, leaf: ItemRows, item_ids: torch.Tensor | None) -> ItemRows:
        """`unnormalized_rows` without their ``norm_eps``."""
        return leaf

    def unnormalized_rows(self, leaf: ItemRows, item_ids: torch.Tensor | None) -> ItemRows:
        """`scored_rows` that are still to be normalised, with the ``norm_eps`` to do it by."""
        norm_eps = self.l2_norm_eps if self.item_l2_norm else None
        return replace(self.raw_rows(leaf, item_ids), norm_eps=norm_eps)

    def scored_rows(self, leaf: ItemRows, item_ids: torch.Tensor | None) -> ItemRows:
        """Scored embeddings of the sorted unique items ``item_ids`` (None: all), from the gathered table rows."""
        return self.unnormalized_rows(leaf, item_ids).normalized()

    def embed_history(self, item_ids: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` for ids of any shape."""
        return self.history_rows(self.rows(item_ids)).lookup(item_ids)

    def get_item_embeddings(self, item_ids: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` for ids of any shape, as scored against queries."""
        rows = self.unnormalized_rows(self.rows(item_ids), None)
        return ItemRows(rows.lookup(item_ids), norm_eps=rows.norm_eps).normalized().weight

    def all_item_embeddings(self) -> torch.Tensor:
        """``[V, D]``: row i belongs to item id i + 1."""
        return self.scored_rows(self.all_rows(), None).catalogue()


@register_item_embedding("local")
class LocalEmbeddingModule(ItemEmbedding):
    """One trained row per item (the published ``embedding_module_type = "local"``)."""


@register_item_embedding("categorical")
class CategoricalEmbeddingModule(ItemEmbedding):
    """Items share the row of their category (the published ``"categorical"``).

    item_category: ``[V]`` int64, the category 0..C-1 of item id i + 1.
    """

    row_of_item: torch.Tensor

    def __init__(
        self,
        item_category: torch.Tensor | None,
        embedding_dim: int,
        *,
        item_l2_norm: bool = False,
        l2_norm_eps: Positive = 1e-6,
    ) -> None:
        if item_category is None:
            raise ValueError(
                'embedding_module_type "categorical" needs train_fn.category_feature, one category for each item'
            )
        if item_category.numel() == 0 or int(item_category.min()) < 0:
            raise ValueError("item_category must hold a category of 0 or more for every item")
        super().__init__(
            item_category.numel(), embedding_dim, int(item_category.max()) + 1,
            item_l2_norm=item_l2_norm, l2_norm_eps=l2_norm_eps,
        )  # fmt: skip
        rows = torch.cat([item_category.new_zeros(1), item_category + 1]).long()
        self.register_buffer("row_of_item", rows)

    def table_rows(self, item_ids: torch.Tensor) -> torch.Tensor:
        return sorted_unique(self.row_of_item[item_ids])

    def history_rows(self, leaf: ItemRows) -> ItemRows:
        return ItemRows(leaf.weight, leaf.ids, self.row_of_item)

    def raw_rows(self, leaf: ItemRows, item_ids: torch.Tensor | None) -> ItemRows:
        return self.history_rows(leaf)
