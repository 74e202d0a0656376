"""Components of the mixture of logits: several embeddings of a query, of an item and of a user."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from absl import logging
from torch import nn
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.mol_layers import (
    GatedUnitName,
    IdentityProjection,
    projection,
)
from generative_recommenders.ops.dropout import dropout


class QueryComponents(NamedTuple):
    """components ``[n, Pq, d]``, already divided by the temperature; gate ``[n, E]`` or None."""

    components: torch.Tensor
    gate: torch.Tensor | None


class ItemComponents(NamedTuple):
    """components ``[R, Pi, d]`` or ``[n, R, Pi, d]``; gate ``[R, E]`` or ``[n, R, E]``, or None."""

    components: torch.Tensor
    gate: torch.Tensor | None

    def select(self, index: slice | torch.Tensor) -> ItemComponents:
        """Those of some items, by a slice or an index tensor of any shape over the first axis."""
        return ItemComponents(self.components[index], None if self.gate is None else self.gate[index])


class Side(NamedTuple):
    """How embeddings of one side, "query" or "item", become its components; see `MoLSimilarity`."""

    name: str
    groups: int
    use_identity_fn: bool
    hidden_dim: int
    dropout_rate: float
    nonlinearity: GatedUnitName

    def projection(self, embedding_dim: int, width: int) -> nn.Module:
        """Embeddings ``[..., D]`` to components ``[..., groups * width]``."""
        if self.nonlinearity != "swiglu":
            self._say_what_acts()
        if not self.use_identity_fn:
            return projection(
                embedding_dim, self.hidden_dim, self.groups * width, self.dropout_rate, self.nonlinearity
            )
        if embedding_dim < width:
            raise UserError(
                f"MoL {self.name}_use_identity_fn takes dot_product_dimension = {width} entries of an embedding of "
                f"{embedding_dim}: lower it or unset {self.name}_use_identity_fn"
            )
        return IdentityProjection(embedding_dim, self.groups, width, self.dropout_rate)

    def _say_what_acts(self) -> None:
        option = f"MoL {self.name}_nonlinearity = {self.nonlinearity}"
        if self.hidden_dim > 0 and not self.use_identity_fn:
            say_once(f"{option} acts; the published code ignored it (swiglu)")
        else:
            say_once(f"{option} cannot act: {self.name}_hidden_dim gives the {self.name} no hidden layer")


class MoLComponents(nn.Module):
    """Projections of queries and items to components, and tables of hashed user ids, one component each."""

    query_gate: nn.Module | None
    item_gate: nn.Module | None

    def __init__(
        self,
        query: Side,
        item: Side,
        query_embedding_dim: int,
        item_embedding_dim: int,
        dot_product_dimension: int,
        dot_product_l2_norm: bool,
        temperature: float,
        eps: float,
        uid_embedding_hash_sizes: tuple[int, ...],
        uid_dropout_rate: float,
        uid_embedding_level_dropout: bool,
    ) -> None:
        super().__init__()
        self.dot_product_dimension, self.dot_product_l2_norm = dot_product_dimension, dot_product_l2_norm
        self.logit_temperature, self.eps = temperature, eps
        self.hash_sizes, self.uid_dropout_rate = uid_embedding_hash_sizes, uid_dropout_rate
        self.uid_embedding_level_dropout = uid_embedding_level_dropout
        self.query_projection = query.projection(query_embedding_dim, dot_product_dimension)
        self.item_projection = item.projection(item_embedding_dim, dot_product_dimension)
        self.user_tables = nn.ModuleList(
            nn.Embedding(rows, dot_product_dimension) for rows in uid_embedding_hash_sizes
        )
        if uid_embedding_hash_sizes:
            say_once("MoL uid_embedding_hash_sizes acts; the published HSTU code ignored it")

    def query_components(
        self, queries: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[QueryComponents, dict[str, torch.Tensor]]:
        """Components and gate input of queries ``[n, D]`` of users ``[n]``, and the sums of ``uid_embedding_l2_norm``."""
        components = self._split(self.query_projection(queries))
        users, losses = self._user_components(user_ids)
        components = torch.cat([components, *users], dim=-2) / self.logit_temperature
        return QueryComponents(components, self.query_gate(queries) if self.query_gate else None), losses

    def item_components(self, items: torch.Tensor) -> ItemComponents:
        """What the mixture needs of items ``[..., D']``; may be computed once for evaluation."""
        components = self._split(self.item_projection(items))
        return ItemComponents(components, self.item_gate(items) if self.item_gate else None)

    def _user_components(
        self, user_ids: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """``[n, 1, d]`` of each table, and the squared norms of what was looked up, summed over tables and users, beside
        the number of users.
        """
        if not len(self.user_tables):
            return [], {}
        if user_ids is None:
            raise UserError(
                "MoL uid_embedding_hash_sizes needs user ids, but none were given: pass them or unset it"
            )
        found = [table(user_ids % size) for table, size in zip(self.user_tables, self.hash_sizes)]
        losses = {}
        if self.training:
            squares = torch.stack([v.square().sum() for v in found]).sum()
            losses["uid_embedding_l2_norm"] = torch.stack([squares, squares.new_full((), len(user_ids))])
        known = (user_ids > 0)[:, None, None]  # id 0 is a user whom training did not have: its vector is zero
        return [self._normalised(self._drop_user(v))[:, None] * known for v in found], losses

    def _drop_user(self, vectors: torch.Tensor) -> torch.Tensor:
        """Drops whole vectors of ``[n, d]`` or single elements, as set."""
        rate = self.uid_dropout_rate
        if not self.uid_embedding_level_dropout:
            return dropout(vectors, rate, self.training)
        return vectors * dropout(torch.ones_like(vectors[:, :1]), rate, self.training)

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        """``[..., P * d]`` as components ``[..., P, d]``, of norm 1 where asked for."""
        components = projected.unflatten(-1, (-1, self.dot_product_dimension))
        return self._normalised(components)

    def _normalised(self, components: torch.Tensor) -> torch.Tensor:
        if not self.dot_product_l2_norm:
            return components
        return F.normalize(components, dim=-1, eps=self.eps)


@cache
def say_once(line: str) -> None:
    """Logs what published code ignored and acts here, once a process however many models are built."""
    logging.info(line)
