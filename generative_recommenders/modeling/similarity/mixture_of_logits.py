"""Mixture of logits (MoL): gated dot products between several embeddings of the query and of the item.

arXiv 2306.04039 and 2407.15462. With component embeddings f_q [Pq, d] and f_x [Pi, d] and E = Pq * Pi entries
e = (n, m): ``l_e = <f_q[n], f_x[m]> / temperature``, ``p = softmax(gate(q, x, l))``, ``score = sum_e p_e
l_e``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from absl import logging
from torch import nn
from torch.nn import functional as F

from generative_recommenders.config.registry import register_similarity
from generative_recommenders.config.sections import MoLSettings
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.interface import AuxiliaryLosses, SharedRows, Snapshot
from generative_recommenders.modeling.similarity.mol_layers import (
    COMBINATIONS,
    IdentityProjection,
    projection,
    two_layers,
)
from generative_recommenders.ops import dispatch, numbered_rows
from generative_recommenders.ops.dropout import dropout
from generative_recommenders.ops.recomputation import recomputed

_EPS = 1e-6

_BLOCK_FLOATS = 2**25
"""Floats of temporaries a block of (query, item) pairs may take; more pairs are scored block by block."""

_KEPT_FLOATS = 2**30
"""Floats that the blocks of a call may keep for the backward pass; beyond, each block is computed again."""


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


ItemsOf = Callable[[slice, slice], ItemComponents]
"""The items of a block of rows and columns: ``[c, ...]`` shared by the rows, or ``[r, c, ...]``."""


class MoLSimilarity(nn.Module):
    """Mixture of logits over query and item embeddings.

    settings: see `MoLSettings`. query_embedding_dim, item_embedding_dim: widths D and D'.
    mutual_information: whether training returns ``mi_loss``, which balances the load of the mixture. temperature: what the
    mixture's score is divided by, beside the settings' own, which divides its logits.

    Where (query, item) pairs are many, they are scored block by block; beyond `_KEPT_FLOATS` a block's activations are
    computed again in the backward pass, so that memory is bounded.
    """

    def __init__(
        self,
        settings: MoLSettings,
        query_embedding_dim: int,
        item_embedding_dim: int,
        mutual_information: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.settings = s = settings
        self.mutual_information = mutual_information
        tables, width = len(s.uid_embedding_hash_sizes), s.dot_product_dimension
        self.num_logits = s.query_dot_product_groups * s.item_dot_product_groups
        self.query_projection = _projection(
            s, "query", query_embedding_dim, s.query_dot_product_groups - tables
        )
        self.item_projection = _projection(s, "item", item_embedding_dim, s.item_dot_product_groups)
        self.user_tables = nn.ModuleList(nn.Embedding(rows, width) for rows in s.uid_embedding_hash_sizes)
        self.query_gate = (
            two_layers(query_embedding_dim, s.gating_query_hidden_dim, self.num_logits, 0.0, bias=False)
            if s.gating_query_fn
            else None
        )
        self.item_gate = (
            two_layers(
                item_embedding_dim,
                s.gating_item_hidden_dim,
                self.num_logits,
                s.gating_item_dropout_rate,
                bias=False,
            )
            if s.gating_item_fn
            else None
        )
        self.cross_gate = two_layers(
            self.num_logits, s.gating_qi_hidden_dim, self.num_logits, s.gating_qi_dropout_rate, bias=True
        )

    @classmethod
    def from_settings(
        cls,
        settings: MoLSettings,
        query_embedding_dim: int,
        item_embedding_dim: int,
        mutual_information: bool = True,
        temperature: float = 1.0,
    ) -> MoLSimilarity:
        """The module; options that the published code ignored and that act here are said once in the log."""
        for side in ("query", "item"):
            name, hidden = getattr(settings, f"{side}_nonlinearity"), getattr(settings, f"{side}_hidden_dim")
            acts = hidden > 0 and not getattr(settings, f"{side}_use_identity_fn")
            if name != "swiglu" and acts:
                _say(f"MoL {side}_nonlinearity = {name} acts; the published code ignored it (swiglu)")
            elif name != "swiglu":
                _say(
                    f"MoL {side}_nonlinearity = {name} cannot act: {side}_hidden_dim gives the {side} no hidden layer"
                )
        if settings.uid_embedding_hash_sizes:
            _say("MoL uid_embedding_hash_sizes acts; the published HSTU code ignored it")
        return cls(settings, query_embedding_dim, item_embedding_dim, mutual_information, temperature)

    @property
    def auxiliary_loss_names(self) -> frozenset[str]:
        """``mi_loss`` where asked for; ``uid_embedding_l2_norm`` where there are user-id tables."""
        names = {"mi_loss"} if self.mutual_information else set()
        return frozenset(names | ({"uid_embedding_l2_norm"} if len(self.user_tables) else set()))

    def query_components(
        self, queries: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[QueryComponents, dict[str, torch.Tensor]]:
        """Components and gate input of queries ``[n, D]`` of users ``[n]``, and the sums of ``uid_embedding_l2_norm``."""
        components = self._split(self.query_projection(queries))
        users, losses = self._user_components(user_ids)
        components = torch.cat([components, *users], dim=-2) / self.settings.temperature
        return QueryComponents(components, self.query_gate(queries) if self.query_gate else None), losses

    def item_components(self, items: torch.Tensor) -> ItemComponents:
        """What the mixture needs of items ``[..., D']``; may be computed once for evaluation."""
        components = self._split(self.item_projection(items))
        return ItemComponents(components, self.item_gate(items) if self.item_gate else None)

    def score(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """``[n, R]`` scores of items ``[R, D']`` (or ``[1, R, D']``) or ``[n, R, D']`` by queries ``[n, D]``.

        user_ids: ``[n]`` int64, needed where there are user-id tables. In training mode the auxiliary losses
        of `auxiliary_loss_names` come with them: ``mi_loss`` (arXiv 2407.15462) is
        sum_e pbar_e ln(pbar_e) minus the mean of sum_e p_e ln(p_e), pbar the mean over all pairs of this
        call.
        """
        if items.dim() == 3 and items.shape[0] == 1:
            items = items[0]
        with self._autocast(queries):
            query, losses = self.query_components(queries, user_ids)
            if items.dim() == 2:
                scores, mixing = self._score(query, len(items), _shared(self.item_components(items)))
            else:
                scores, mixing = self._score(
                    query, items.shape[1], lambda rows, columns: self.item_components(items[rows, columns])
                )
        return scores, self.auxiliary_losses(losses | mixing)

    def operands(self, states: torch.Tensor, weight: torch.Tensor) -> None:
        """None: a mixture of products is no product."""
        return

    def snapshot(self, embeddings: torch.Tensor) -> Snapshot:
        """The embeddings ``[V, D']`` and their components."""
        return Snapshot(embeddings, self.item_components(embeddings))

    def scores(
        self, queries: torch.Tensor, snapshot: Snapshot, user_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """``[n, V]`` scores of the snapshot's items."""
        query, _ = self.query_components(queries, user_ids)
        return self.score_components(query, snapshot.components)[0]

    def auxiliary_losses(self, sums: dict[str, torch.Tensor]) -> AuxiliaryLosses:
        """The means of what `score_rows` summed up; see `score`."""
        losses = {}
        if "mi_loss" in sums:
            used, negative_entropy, pairs = sums["mi_loss"].tensor_split((-2, -1))
            mean = used / pairs.clamp(min=1)
            losses["mi_loss"] = (mean * torch.log(mean + _EPS)).sum() - (
                negative_entropy / pairs.clamp(min=1)
            ).sum()
        if "uid_embedding_l2_norm" in sums:
            squares, users = sums["uid_embedding_l2_norm"].unbind()
            losses["uid_embedding_l2_norm"] = squares / users.clamp(min=1)
        return losses

    def forward(
        self, queries: torch.Tensor, items: torch.Tensor, user_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """The same as `score`."""
        return self.score(queries, items, user_ids)

    def score_rows(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor,
        user_ids: torch.Tensor | None = None,
        shared: SharedRows = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``[n, P + R]`` scores of ``items[rows]`` and of shared items; items ``[U, D']``, rows ``[n, P]`` int64.

        An item's components are computed once however often it is scored, which is several times faster than
        `score` on gathered items; its dropout is then drawn once too, not for every pair. Shared items are
        scored by one product, without gathering them for every pair.
        """
        with self._autocast(queries):
            query, losses = self.query_components(queries, user_ids)
            with numbered_rows.of_items():
                parts = self.item_components(items)
            every = slice(0, len(queries))
            scores, mixed = self._mixed(query, every, rows.shape[1], lambda r, c: parts.select(rows[r, c]))
            behind = [
                self._mixed(query, span, len(ids), _shared(parts.select(ids)), purpose=1)
                for span, ids in shared
            ]
            if behind:
                scores = torch.cat([scores, torch.cat([each for each, _ in behind])], dim=1)
                mixed += [block for _, blocks in behind for block in blocks]
        return scores, losses | self._mixture_sums(mixed, scores.numel())

    def score_components(
        self, query: QueryComponents, items: ItemComponents, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scores from components made before.

        items: of R shared items; or, with rows ``[n, R']`` int64, of any number of items, of which query i
            scores ``rows[i]``. Gathering and scoring run block by block. Returns ``[n, R]`` or ``[n, R']``,
            and the sums of ``mi_loss``.
        """
        with self._autocast(query.components):
            if rows is None:
                return self._score(query, len(items.components), _shared(items))
            return self._score(query, rows.shape[1], lambda r, c: items.select(rows[r, c]))

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
        sizes = self.settings.uid_embedding_hash_sizes
        found = [table(user_ids % size) for table, size in zip(self.user_tables, sizes)]
        losses = {}
        if self.training:
            squares = torch.stack([v.square().sum() for v in found]).sum()
            losses["uid_embedding_l2_norm"] = torch.stack([squares, squares.new_full((), len(user_ids))])
        known = (user_ids > 0)[:, None, None]  # id 0 is a user whom training did not have: its vector is zero
        return [self._normalised(self._drop_user(v))[:, None] * known for v in found], losses

    def _drop_user(self, vectors: torch.Tensor) -> torch.Tensor:
        """Drops whole vectors of ``[n, d]`` or single elements, as set."""
        rate = self.settings.uid_dropout_rate
        if not self.settings.uid_embedding_level_dropout:
            return dropout(vectors, rate, self.training)
        return vectors * dropout(torch.ones_like(vectors[:, :1]), rate, self.training)

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        """``[..., P * d]`` as components ``[..., P, d]``, of norm 1 where asked for."""
        components = projected.unflatten(-1, (-1, self.settings.dot_product_dimension))
        return self._normalised(components)

    def _normalised(self, components: torch.Tensor) -> torch.Tensor:
        if not self.settings.dot_product_l2_norm:
            return components
        return F.normalize(components, dim=-1, eps=_EPS)

    def _autocast(self, like: torch.Tensor) -> AbstractContextManager:
        if not (self.settings.bf16_training and self.training):
            return nullcontext()
        return dispatch.autocast(like, torch.bfloat16)

    def _score(
        self, query: QueryComponents, num_items: int, items_of: ItemsOf
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``[n, num_items]`` scores of all queries; ``items_of(rows, columns)`` gives a block's items."""
        scores, mixed = self._mixed(query, slice(0, len(query.components)), num_items, items_of)
        return scores, self._mixture_sums(mixed, scores.numel())

    def _mixed(
        self, query: QueryComponents, span: slice, num_items: int, items_of: ItemsOf, purpose: int = 0
    ) -> tuple[torch.Tensor, list[_Mixed]]:
        """``[m, num_items]`` scores of the m queries of a span, and the blocks in which they were made. purpose: of the items,
        for dropout: 1 for shared ones.
        """
        row_blocks, column_blocks = self._blocks(span, num_items)
        pairs = len(query.components) * num_items
        kept = pairs * (10 * self.num_logits + 2 * max(self.settings.gating_qi_hidden_dim, 0))
        again = torch.is_grad_enabled() and kept > _KEPT_FLOATS
        mixed: list[list[_Mixed]] = [[] for _ in row_blocks]
        for rows, done in zip(row_blocks, mixed):
            for columns in column_blocks:
                if again:
                    done.append(recomputed(self._mix, query, items_of, rows, columns, purpose))
                else:
                    done.append(self._mix(query, items_of, rows, columns, purpose))
        scores = torch.cat([torch.cat([block.scores for block in done], dim=1) for done in mixed])
        return scores, [block for done in mixed for block in done]

    def _blocks(self, span: slice, num_items: int) -> tuple[list[slice], list[slice]]:
        """Row and column slices such that the temporaries of a block stay near `_BLOCK_FLOATS`."""
        s = self.settings
        projected = s.item_dot_product_groups * s.dot_product_dimension + 2 * max(s.item_hidden_dim, 0)
        floats_per_pair = 6 * self.num_logits + 2 * max(s.gating_qi_hidden_dim, 0) + projected
        pairs = max(1, _BLOCK_FLOATS // floats_per_pair)
        columns = min(max(num_items, 1), pairs)
        return _slices(span.start, span.stop, max(1, pairs // columns)), _slices(0, num_items, columns)

    def _mix(
        self, query: QueryComponents, items_of: ItemsOf, rows: slice, columns: slice, purpose: int
    ) -> _Mixed:
        items = items_of(rows, columns)
        pairing = "bnd,xmd->bxnm" if items.components.dim() == 3 else "bnd,bxmd->bxnm"
        logits = torch.einsum(pairing, query.components[rows], items.components).flatten(2)
        query_gate = None if query.gate is None else query.gate[rows][:, None]
        with numbered_rows.of_block(rows, 2 * columns.start + purpose):
            combine = COMBINATIONS[self.settings.gating_combination_type]
            gate = combine(query_gate, items.gate, self.cross_gate(logits))
            p = self._drop_mixture(_at_least_float32(gate).softmax(-1))
        scores = _at_least_float32((p * logits).sum(-1))
        if self.temperature != 1:
            scores = scores / self.temperature
        if not (self.training and self.mutual_information):
            return _Mixed(scores, None, None)
        return _Mixed(scores, p.sum((0, 1)), (p * torch.log(p + _EPS)).sum())

    def _drop_mixture(self, p: torch.Tensor) -> torch.Tensor:
        """Drops entries of the mixture and brings the rest back to a sum of 1."""
        if self.settings.softmax_dropout_rate == 0 or not self.training:
            return p
        p = dropout(p, self.settings.softmax_dropout_rate, self.training)
        return p / p.sum(-1, keepdim=True).clamp(min=_EPS)

    def _mixture_sums(self, blocks: list[_Mixed], num_pairs: int) -> dict[str, torch.Tensor]:
        """Of ``mi_loss``: ``[E + 2]``, the sums of p and of p ln p over the blocks' pairs, and the number of pairs."""
        used = [block.used for block in blocks if block.used is not None]
        negative_entropy = [block.negative_entropy for block in blocks if block.negative_entropy is not None]
        if not used:
            return {}
        pairs = used[0].new_full((1,), num_pairs)
        return {
            "mi_loss": torch.cat([torch.stack(used).sum(0), torch.stack(negative_entropy).sum()[None], pairs])
        }


register_similarity("MoL", gin_name="MoLSimilarity")(MoLSimilarity.from_settings)


class _Mixed(NamedTuple):
    """scores ``[r, c]`` float32; over the block's pairs the sums of p ``[E]`` and of p ln p, where they are
    needed.
    """

    scores: torch.Tensor
    used: torch.Tensor | None
    negative_entropy: torch.Tensor | None


def _projection(s: MoLSettings, side: str, embedding_dim: int, groups: int) -> nn.Module:
    """Embeddings ``[..., D]`` to components ``[..., groups * d]`` of the query's or the item's side."""
    rate, width = getattr(s, f"{side}_dropout_rate"), s.dot_product_dimension
    if not getattr(s, f"{side}_use_identity_fn"):
        hidden, name = getattr(s, f"{side}_hidden_dim"), getattr(s, f"{side}_nonlinearity")
        return projection(embedding_dim, hidden, groups * width, rate, name)
    if embedding_dim < width:
        raise UserError(
            f"MoL {side}_use_identity_fn takes dot_product_dimension = {width} entries of an embedding of "
            f"{embedding_dim}: lower it or unset {side}_use_identity_fn"
        )
    return IdentityProjection(embedding_dim, groups, width, rate)


def _shared(items: ItemComponents) -> ItemsOf:
    return lambda rows, columns: items.select(columns)


def _slices(first: int, stop: int, step: int) -> list[slice]:
    """Slices of ``step`` over first..stop; one empty slice where there is nothing."""
    return [slice(start, min(start + step, stop)) for start in range(first, max(stop, first + 1), step)]


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@cache
def _say(line: str) -> None:
    logging.info(line)
