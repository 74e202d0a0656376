"""Components of the mixture of logits: several embeddings of a query, of an item and of a user."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, NamedTuple

import torch
from absl import logging
from torch import nn

from generative_recommenders.config.fields import (
    HiddenWidth,
    NonNegative,
    OptionGroup,
    Share,
    SmallCount,
    TableRows,
)
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.initialization import xavier_normal_matrices_
from generative_recommenders.modeling.similarity.mol_layers import (
    GatedUnitName,
    IdentityProjection,
    projection,
)
from generative_recommenders.ops.dropout import dropout
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.ops.normalization import l2_normalize
from generative_recommenders.ops.products.normalized import normalized_products

DEFAULT_UNIT: GatedUnitName = "geglu"


class QueryOptions(OptionGroup):
    """Projection of an embedding to the query's components: dropout, a gated hidden layer, a linear layer."""

    prefix: ClassVar[str] = "query_"

    dot_product_groups: SmallCount = 8
    """Components of a query, Pq, those of the user's id among them."""
    use_identity_fn: bool = False
    """The first component is the embedding itself, cut to the width of a component; the others are one linear layer of
    it."""
    hidden_dim: HiddenWidth = 512
    """Hidden width; 0 or below for no hidden layer."""
    dropout_rate: Share = 0.0
    """Dropout before the hidden layer."""
    nonlinearity: GatedUnitName = DEFAULT_UNIT
    """Gated units of the hidden layer (arXiv 2002.05202)."""


class ItemOptions(OptionGroup):
    """The same of an item."""

    prefix: ClassVar[str] = "item_"

    dot_product_groups: SmallCount = 4
    """Components of an item, Pi."""
    use_identity_fn: bool = False
    """The first component is the embedding itself, cut to the width of a component; the others are one linear layer of
    it."""
    hidden_dim: HiddenWidth = -1
    """Hidden width; 0 or below for no hidden layer."""
    dropout_rate: Share = 0.0
    """Dropout before the hidden layer."""
    dropout_shared: bool = False
    """A step draws an item's dropout once for the positives and once for the negatives, not for every pair with a query
    as published, which costs several times as much."""
    nonlinearity: GatedUnitName = DEFAULT_UNIT
    """Gated units of the hidden layer (arXiv 2002.05202)."""


class UserOptions(OptionGroup):
    """Tables of hashed user ids, each of which takes one of the query's groups."""

    prefix: ClassVar[str] = "uid_"

    dropout_rate: Share = 0.5
    """Dropout on the looked-up embeddings of the user's id."""
    embedding_hash_sizes: tuple[TableRows, ...] | None = None
    """Rows of each table; None for no component of the user's id."""
    embedding_level_dropout: bool = False
    """Dropout takes whole vectors."""
    embedding_l2_weight_decay: NonNegative = 0.0
    """Weight of the auxiliary loss ``uid_embedding_l2_norm``, added to the one that ``loss_weights`` give it."""


class QueryComponents(NamedTuple):
    """components ``[n, Pq, d]``, already divided by the temperature; gate ``[n, E]`` or None."""

    components: torch.Tensor
    gate: torch.Tensor | None


class ItemComponents(NamedTuple):
    """components ``[R, Pi, d]`` or ``[n, R, Pi, d]``; gate ``[R, E]`` or ``[n, R, E]``, or None.

    scaled: components are as they are multiplied; otherwise they are still to be normalised.
    """

    components: torch.Tensor
    gate: torch.Tensor | None
    scaled: bool = True

    def select(self, index: slice | torch.Tensor) -> ItemComponents:
        """Those of some items, by a slice or an index tensor of any shape over the first axis."""
        if isinstance(index, slice):
            gate = None if self.gate is None else self.gate[index]
            return self._replace(components=self.components[index], gate=gate)
        # An index's gradient would be added up by torch's threads in whatever order they come.
        gate = None if self.gate is None else lookup_rows(self.gate, index)
        components = lookup_rows(self.components.flatten(1), index).unflatten(-1, self.components.shape[1:])
        return self._replace(components=components, gate=gate)


class MoLComponents(nn.Module):
    """Projections of queries and items to components, and tables of hashed user ids, one component each."""

    query_gate: nn.Module | None
    item_gate: nn.Module | None

    def __init__(
        self,
        query: QueryOptions,
        item: ItemOptions,
        users: UserOptions,
        widths: tuple[int, int, int],
        dot_product_l2_norm: bool,
        temperature: float,
        eps: float,
    ) -> None:
        """widths: of a query, of an item and of a component. UserError for options that cannot be together."""
        super().__init__()
        sizes = users.embedding_hash_sizes or ()
        if query.dot_product_groups <= len(sizes):
            raise UserError(
                f"MoL query_dot_product_groups = {query.dot_product_groups}: must exceed the {len(sizes)} groups that "
                "uid_embedding_hash_sizes take"
            )
        if users.embedding_l2_weight_decay and not sizes:
            raise UserError(
                f"MoL uid_embedding_l2_weight_decay = {users.embedding_l2_weight_decay}: needs the tables of "
                "uid_embedding_hash_sizes"
            )
        query_dim, item_dim, self.dot_product_dimension = widths
        self.dot_product_l2_norm, self.logit_temperature, self.eps = dot_product_l2_norm, temperature, eps
        self.users, self.hash_sizes = users, sizes
        own_groups = query.dot_product_groups - len(sizes)
        self.query_projection = side_projection(query, query_dim, own_groups, self.dot_product_dimension)
        self.item_projection = side_projection(item, item_dim, item.dot_product_groups, self.dot_product_dimension)
        self.user_tables = nn.ModuleList(nn.Embedding(rows, self.dot_product_dimension) for rows in sizes)
        xavier_normal_matrices_(self.user_tables)
        if sizes:
            say_once("MoL uid_embedding_hash_sizes acts, as in rails' code; Meta's ignores it")

    def query_components(
        self, queries: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[QueryComponents, dict[str, torch.Tensor]]:
        """Components and gate input of queries ``[n, D]`` of users ``[n]``. In training with user tables, also the sums
        of ``uid_embedding_l2_norm``: squares of what was looked up, over tables and users, and the number of users.
        """
        projected = self.query_projection(queries).unflatten(-1, (-1, self.dot_product_dimension))
        components = [self._normalized(projected)]
        losses = {}
        if len(self.user_tables):
            if user_ids is None:
                raise UserError(
                    "MoL uid_embedding_hash_sizes needs user ids, but none were given: pass them or unset it"
                )
            found = [table(user_ids % size) for table, size in zip(self.user_tables, self.hash_sizes)]
            if self.training:
                squares = torch.stack([v.square().sum() for v in found]).sum()
                losses["uid_embedding_l2_norm"] = torch.stack([squares, squares.new_full((), len(user_ids))])
            # Id 0 is a user whom training did not have: its vector is zero.
            known = (user_ids > 0)[:, None, None]
            rate, whole = self.users.dropout_rate, self.users.embedding_level_dropout
            for vectors in found:
                dropped = dropout(torch.ones_like(vectors[:, :1]) if whole else vectors, rate, self.training)
                # Where whole, `dropped` is one number a user: 0, or dropout's scale.
                components.append(self._normalized(vectors * dropped if whole else dropped)[:, None] * known)
        query = torch.cat(components, dim=-2) / self.logit_temperature
        return QueryComponents(query, self.query_gate(queries) if self.query_gate else None), losses

    def item_components(
        self, items: torch.Tensor, normalized: bool = True, gate: torch.Tensor | None = None
    ) -> ItemComponents:
        """Item-side inputs of the mixture, of items ``[..., D']``; may be computed once for evaluation.

        normalized: False leaves the norm of components to `component_logits`: less work where each is of one pair
        alone. gate: ``[..., E]`` of these items where it was made before.
        """
        projected = self.item_projection(items).unflatten(-1, (-1, self.dot_product_dimension))
        scaled = normalized or not self.dot_product_l2_norm
        components = self._normalized(projected) if normalized else projected
        if gate is None and self.item_gate is not None:
            gate = self.item_gate(items)
        return ItemComponents(components, gate, scaled)

    def component_logits(self, query: torch.Tensor, items: ItemComponents) -> torch.Tensor:
        """``[b, x, E]`` products of every component of queries ``[b, Pq, d]`` with every one of x items."""
        components = items.components
        if components.dim() == 3:
            return torch.einsum("bnd,xmd->bxnm", query, components).flatten(2)
        rows = components.flatten(1, 2)
        products = rows @ query.mT if items.scaled else normalized_products(query, rows, self.eps)
        return products.unflatten(1, components.shape[1:3]).mT.flatten(2)

    def _normalized(self, components: torch.Tensor) -> torch.Tensor:
        """Components ``[..., d]``, normalised where ``dot_product_l2_norm`` asks for it."""
        return l2_normalize(components, self.eps) if self.dot_product_l2_norm else components


def side_projection(options: QueryOptions | ItemOptions, embedding_dim: int, groups: int, width: int) -> nn.Module:
    """Embeddings ``[..., D]`` of one side to components ``[..., groups * width]``."""
    name = options.prefix.removesuffix("_")
    unit = f"MoL {name}_nonlinearity = {options.nonlinearity}"
    if options.hidden_dim > 0 and not options.use_identity_fn:
        if options.nonlinearity == "geglu":
            say_once(f"{unit} acts, as in rails' code; Meta's is swiglu whatever it says")
        elif options.nonlinearity != "swiglu":
            say_once(f"{unit} acts; it is swiglu in rails' and Meta's code")
    elif options.nonlinearity != DEFAULT_UNIT:
        say_once(f"{unit} has no effect: {name}_hidden_dim gives the {name} no hidden layer")
    if not options.use_identity_fn:
        # rails' code sets every bias to zero but that of a query's projection with a hidden layer; Meta's sets it, too.
        zero_bias = isinstance(options, ItemOptions)
        sizes = embedding_dim, options.hidden_dim, groups * width
        return projection(*sizes, options.dropout_rate, options.nonlinearity, zero_bias)
    if embedding_dim < width:
        raise UserError(
            f"MoL {name}_use_identity_fn takes dot_product_dimension = {width} entries of an embedding of "
            f"{embedding_dim}: lower it or unset {name}_use_identity_fn"
        )
    return IdentityProjection(embedding_dim, groups, width, options.dropout_rate)


@cache
def say_once(line: str) -> None:
    """Logs how an option relates to the published programs, once in a process however many models it builds."""
    logging.info(line)
