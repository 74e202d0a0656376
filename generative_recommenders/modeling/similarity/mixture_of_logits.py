"""Mixture of logits (MoL): gated dot products between several embeddings of the query and of the item.

arXiv 2306.04039 and 2407.15462. With component embeddings f_q [Pq, d] and f_x [Pi, d] and E = Pq * Pi entries
e = (n, m): ``l_e = <f_q[n], f_x[m]> / temperature``, ``p = softmax(gate(q, x, l))``, ``score = sum_e p_e
l_e``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from generative_recommenders.config.fields import (
    HiddenWidth,
    Layers,
    NonNegative,
    Positive,
    Share,
    Size,
    Width,
)
from generative_recommenders.config.registry import register_similarity
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.interface import AuxiliaryLosses, SharedRows, Snapshot
from generative_recommenders.modeling.similarity.mol_components import (
    ItemComponents,
    MoLComponents,
    QueryComponents,
    Side,
)
from generative_recommenders.modeling.similarity.mol_layers import (
    COMBINATIONS,
    CombinationName,
    GatedUnitName,
    two_layers,
)
from generative_recommenders.ops import dispatch, numbered_rows
from generative_recommenders.ops.dropout import dropout
from generative_recommenders.ops.recomputation import recomputed

_EPS = 1e-6
"""Within logarithms of the mixture's entropy."""

_BLOCK_FLOATS = 2**25
"""Floats of temporaries a block of (query, item) pairs may take; more pairs are scored block by block."""

_KEPT_FLOATS = 2**30
"""Floats that the blocks of a call may keep for the backward pass; beyond, each block is computed again."""


ItemsOf = Callable[[slice, slice], ItemComponents]
"""The items of a block of rows and columns: ``[c, ...]`` shared by the rows, or ``[r, c, ...]``."""


@register_similarity("MoL", gin_name="create_mol_interaction_module")
class MoLSimilarity(MoLComponents):
    """Mixture of logits over query embeddings ``[n, D]`` and item embeddings ``[R, D']``, with the published options.

    Hidden widths of 0 or below mean no hidden layer (for the query, the item and the gate's cross term).
    query_use_identity_fn, item_use_identity_fn: the first component is the embedding itself, cut to
    dot_product_dimension, and the others are one linear layer of it. Nonlinearities are gated units (arXiv 2002.05202).
    uid_embedding_hash_sizes: rows of each table of hashed user ids; every table takes one of the query's groups.
    uid_embedding_l2_weight_decay: weight of the auxiliary loss ``uid_embedding_l2_norm``, added to the one that
    ``loss_weights`` give it. eps: least norm and least sum that is divided by. bf16_training: products of training in
    bfloat16. activation_checkpoint: activations are computed again in the backward pass, always and not only where pairs are
    very many. mutual_information: whether training returns ``mi_loss``, which balances the load of the mixture. temperature
    divides the logits; score_temperature (``train_fn.temperature``) what comes out of the mixture.

    Where (query, item) pairs are many, they are scored block by block; beyond `_KEPT_FLOATS` a block's activations are
    computed again in the backward pass, so that memory is bounded.
    """

    def __init__(
        self,
        query_embedding_dim: int,
        item_embedding_dim: int,
        mutual_information: bool = True,
        query_dot_product_groups: Layers = 8,
        item_dot_product_groups: Layers = 4,
        dot_product_dimension: Width = 64,
        dot_product_l2_norm: bool = True,
        temperature: Positive = 0.05,
        query_use_identity_fn: bool = False,
        query_hidden_dim: HiddenWidth = 512,
        query_dropout_rate: Share = 0.0,
        query_nonlinearity: GatedUnitName = "swiglu",
        item_use_identity_fn: bool = False,
        item_hidden_dim: HiddenWidth = -1,
        item_dropout_rate: Share = 0.0,
        item_nonlinearity: GatedUnitName = "swiglu",
        gating_query_hidden_dim: HiddenWidth = 128,
        gating_query_fn: bool = True,
        gating_item_hidden_dim: HiddenWidth = 128,
        gating_item_fn: bool = True,
        gating_item_dropout_rate: Share = 0.0,
        gating_qi_hidden_dim: HiddenWidth = 128,
        gating_qi_dropout_rate: Share = 0.0,
        gating_combination_type: CombinationName = "glu_silu",
        softmax_dropout_rate: Share = 0.0,
        bf16_training: bool = False,
        uid_dropout_rate: Share = 0.5,
        uid_embedding_hash_sizes: tuple[Size, ...] | None = None,
        uid_embedding_level_dropout: bool = False,
        uid_embedding_l2_weight_decay: NonNegative = 0.0,
        eps: Positive = 1e-6,
        activation_checkpoint: bool = False,
        score_temperature: Positive = 1.0,
    ) -> None:
        sizes = tuple(uid_embedding_hash_sizes or ())
        _check(
            query_dot_product_groups, sizes, uid_embedding_l2_weight_decay, gating_combination_type,
            both_gates=gating_query_fn and gating_item_fn,
        )  # fmt: skip
        query = Side(
            "query", query_dot_product_groups - len(sizes), query_use_identity_fn, query_hidden_dim,
            query_dropout_rate, query_nonlinearity,
        )  # fmt: skip
        item = Side(
            "item", item_dot_product_groups, item_use_identity_fn, item_hidden_dim, item_dropout_rate, item_nonlinearity
        )  # fmt: skip
        super().__init__(
            query, item, query_embedding_dim, item_embedding_dim, dot_product_dimension, dot_product_l2_norm,
            temperature, eps, sizes, uid_dropout_rate, uid_embedding_level_dropout,
        )  # fmt: skip
        self.temperature = score_temperature
        self.mutual_information, self.activation_checkpoint = mutual_information, activation_checkpoint
        self.bf16_training, self.softmax_dropout_rate = bf16_training, softmax_dropout_rate
        self.combine_gates = COMBINATIONS[gating_combination_type]
        self.num_logits = query_dot_product_groups * item_dot_product_groups
        gates = (
            (gating_query_fn, query_embedding_dim, gating_query_hidden_dim, 0.0),
            (gating_item_fn, item_embedding_dim, gating_item_hidden_dim, gating_item_dropout_rate),
        )
        self.query_gate, self.item_gate = (
            two_layers(width, hidden, self.num_logits, rate, bias=False) if on else None
            for on, width, hidden, rate in gates
        )
        self.cross_gate = two_layers(
            self.num_logits, gating_qi_hidden_dim, self.num_logits, gating_qi_dropout_rate, bias=True
        )
        # Of a pair: what its temporaries take, and what its backward pass keeps.
        cross, projected = 2 * max(gating_qi_hidden_dim, 0), item_dot_product_groups * dot_product_dimension
        self.floats_per_pair = 6 * self.num_logits + cross + projected + 2 * max(item_hidden_dim, 0)
        self.kept_per_pair = 10 * self.num_logits + cross

    @property
    def auxiliary_loss_names(self) -> frozenset[str]:
        """``mi_loss`` where asked for; ``uid_embedding_l2_norm`` where there are user-id tables."""
        names = {"mi_loss"} if self.mutual_information else set()
        return frozenset(names | ({"uid_embedding_l2_norm"} if len(self.user_tables) else set()))

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

    def _autocast(self, like: torch.Tensor) -> AbstractContextManager:
        if not (self.bf16_training and self.training):
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
        kept = len(query.components) * num_items * self.kept_per_pair
        again = torch.is_grad_enabled() and (self.activation_checkpoint or kept > _KEPT_FLOATS)
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
        pairs = max(1, _BLOCK_FLOATS // self.floats_per_pair)
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
            gate = self.combine_gates(query_gate, items.gate, self.cross_gate(logits))
            p = self._drop_mixture(_at_least_float32(gate).softmax(-1))
        scores = _at_least_float32((p * logits).sum(-1))
        if self.temperature != 1:
            scores = scores / self.temperature
        if not (self.training and self.mutual_information):
            return _Mixed(scores, None, None)
        return _Mixed(scores, p.sum((0, 1)), (p * torch.log(p + _EPS)).sum())

    def _drop_mixture(self, p: torch.Tensor) -> torch.Tensor:
        """Drops entries of the mixture and brings the rest back to a sum of 1."""
        if self.softmax_dropout_rate == 0 or not self.training:
            return p
        p = dropout(p, self.softmax_dropout_rate, self.training)
        return p / p.sum(-1, keepdim=True).clamp(min=self.eps)

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


class _Mixed(NamedTuple):
    """scores ``[r, c]`` float32; over the block's pairs the sums of p ``[E]`` and of p ln p, where they are
    needed.
    """

    scores: torch.Tensor
    used: torch.Tensor | None
    negative_entropy: torch.Tensor | None


def _check(groups: int, sizes: tuple[int, ...], decay: float, combination: str, both_gates: bool) -> None:
    """UserError for options that cannot be together."""
    if groups <= len(sizes):
        raise UserError(
            f"MoL query_dot_product_groups = {groups}: must exceed the {len(sizes)} groups that "
            "uid_embedding_hash_sizes take"
        )
    if decay and not sizes:
        raise UserError(
            f"MoL uid_embedding_l2_weight_decay = {decay}: needs the tables of uid_embedding_hash_sizes"
        )
    if combination != "none" and not both_gates:
        raise UserError(
            f"MoL gating_combination_type = {combination} multiplies two gates: "
            "set gating_query_fn and gating_item_fn, or use none"
        )


def _shared(items: ItemComponents) -> ItemsOf:
    return lambda rows, columns: items.select(columns)


def _slices(first: int, stop: int, step: int) -> list[slice]:
    """Slices of ``step`` over first..stop; one empty slice where there is nothing."""
    return [slice(start, min(start + step, stop)) for start in range(first, max(stop, first + 1), step)]


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
