"""The item tower of a two-tower retriever (doi 10.1145/3366424.3386195): item features to the embeddings that
are scored.

It is an `ItemEmbedding`, so that samplers, losses, index and evaluation need not know of it. Histories look up rows of
the id table; candidates go through the tower, in training only those that a step scores. The query tower is
any encoder, and a `FeatureMerger` may add features of the user to its states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from generative_recommenders.config.fields import Positive, SmallCount
from generative_recommenders.config.registry import register_encoder, register_item_embedding
from generative_recommenders.config.sections import ListReduction
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec, SequenceEmbedding
from generative_recommenders.modeling.items import ItemEmbedding, ItemRows
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.ops.feed_forward import SwiGLUEncoder

BLOCK_ITEMS = 1 << 15
"""Items that go through the tower at a time when nothing is differentiated."""

ITEM_ID = "item_id"
"""The name under which the id itself is a feature."""


@dataclass(frozen=True)
class EntityFeature:
    """One feature of all items or all users.

    values: row i belongs to id i, row 0 to padding: ``[1 + V]`` int64 ids or float32 values, lists ``[1 + V, K]``.
    """

    spec: EmbeddingSpec
    values: torch.Tensor


class FeatureTable(nn.Module):
    """The values of several features by id, as buffers, so that checkpoints hold them."""

    def __init__(self, features: Sequence[EntityFeature]) -> None:
        super().__init__()
        self.names = [feature.spec.name for feature in features]
        for number, feature in enumerate(features):
            self.register_buffer(f"feature{number}", feature.values)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values of ``ids [U]`` by feature name; ids that the table does not have count as padding."""
        values = {name: self.get_buffer(f"feature{number}") for number, name in enumerate(self.names)}
        return {name: column[ids.where(ids < len(column), 0)] for name, column in values.items()}


class ItemTower(nn.Module):
    """Sum of feature embeddings, then SwiGLU layers: the dense network of the tower.

    specs: its features, the id not counted. num_blocks: of `SwiGLUEncoder`, hidden width 2 D.
    """

    def __init__(self, specs: Sequence[EmbeddingSpec], embedding_dim: int, num_blocks: int) -> None:
        super().__init__()
        if num_blocks < 1:
            raise UserError(f"item_tower.num_blocks {num_blocks} must be 1 or more")
        self.embedding_dim = embedding_dim
        self.embedder = SequenceEmbedding(specs)
        self.encoder = nn.Sequential(*(SwiGLUEncoder(embedding_dim, 2 * embedding_dim) for _ in range(num_blocks)))

    def forward(self, features: Mapping[str, torch.Tensor], id_rows: torch.Tensor | None) -> torch.Tensor:
        """``[U, D]`` from features by name (``[U]`` or ``[U, K]``) and rows of the id table ``[U, D]``, or None.

        The id's row is scaled by sqrt(D), as in histories.
        """
        parts = list(self.embedder(features).values())
        if id_rows is not None:
            parts.append(id_rows * self.embedding_dim**0.5)
        return self.encoder(torch.stack(parts).sum(0))


ReadFeatures = Callable[[Sequence[str], ListReduction], Sequence[EntityFeature]]
"""Features of all items by name."""


@register_item_embedding("item_tower", gin_name="item_tower")
class ItemTowerEmbedding(ItemEmbedding):
    """Items through a tower over their features: histories look up the id table, what is scored comes out of an
    `ItemTower`.

    features: columns of the prepared items table; "item_id" is the id itself, by the row of the table that histories
    look up.
    list_reduction: how the embeddings of a list's categories become one.
    num_blocks: blocks of the tower.
    """

    tower: ItemTower

    def __init__(
        self,
        num_items: int,
        embedding_dim: int,
        read_features: ReadFeatures,
        features: tuple[str, ...] = (ITEM_ID,),
        list_reduction: ListReduction = "mean",
        num_blocks: SmallCount = 1,
        *,
        item_l2_norm: bool = False,
        l2_norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__(num_items, embedding_dim, item_l2_norm=item_l2_norm, l2_norm_eps=l2_norm_eps)
        read = read_features([name for name in features if name != ITEM_ID], list_reduction)
        self.uses_item_id = ITEM_ID in features
        if not read and not self.uses_item_id:
            raise UserError("item_tower.features names no feature: give at least one, or 'item_id'")
        for feature in read:
            rows = len(feature.values) - 1
            if rows != num_items:
                raise UserError(f"item feature {feature.spec.name!r} has {rows} rows for {num_items} items")
        self.features = FeatureTable(read)
        self.tower = ItemTower([feature.spec for feature in read], embedding_dim, num_blocks)

    def raw_rows(self, leaf: ItemRows, item_ids: torch.Tensor | None) -> ItemRows:
        """The tower's output for the items; for all of them, in blocks unless it is differentiated, row 0 is 0."""
        if item_ids is not None:
            return ItemRows(self._tower(leaf, item_ids), item_ids)
        every = torch.arange(1, self.num_items + 1, device=leaf.weight.device)
        # A gradient keeps all activations anyway, and one product is faster than many.
        size = self.num_items if torch.is_grad_enabled() else BLOCK_ITEMS
        rows = [self._tower(leaf, ids) for ids in every.split(size)]
        return ItemRows(torch.cat([rows[0].new_zeros(1, self.embedding_dim), *rows]))

    def get_item_embeddings(self, item_ids: torch.Tensor) -> torch.Tensor:
        # An item goes through the tower once, however often it is asked for.
        unique, place = torch.unique(item_ids, return_inverse=True)
        return lookup_rows(self.scored_rows(ItemRows(self.table), unique).weight, place)

    def _tower(self, leaf: ItemRows, item_ids: torch.Tensor) -> torch.Tensor:
        id_rows = leaf.lookup(item_ids) if self.uses_item_id else None
        return self.tower(self.features(item_ids), id_rows)


@register_encoder("TwoTower", gin_name="two_tower")
def two_tower(query_encoder: nn.Module, query_module: str = "SASRec") -> nn.Module:
    """The query tower of a two-tower retriever (doi 10.1145/3366424.3386195); it brings its item embedding along.

    query_module: encoder of the histories, by name.
    """
    return query_encoder


two_tower.item_embedding = "item_tower"  # type: ignore[attr-defined]  # candidates go through the other tower


class FeatureMerger(nn.Module):
    """A context merger: adds the embeddings of the user's features to the query tower's states.

    features: of all users; row 0 stands for unknown users and adds nothing of a categorical feature.
    """

    def __init__(self, features: Sequence[EntityFeature], embedding_dim: int) -> None:
        super().__init__()
        self.features = FeatureTable(features)
        self.embedder = SequenceEmbedding([feature.spec for feature in features])
        self.embedding_dim = embedding_dim

    def forward(self, states: torch.Tensor, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """states ``[T, D]``; events: ``user_ids [T]`` int64, all users unknown without them."""
        users = events.get("user_ids")
        if users is None:
            users = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        embedded = self.embedder(self.features(users))
        return states + torch.stack(list(embedded.values())).sum(0)
