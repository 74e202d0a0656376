"""Mixture of logits (MoL): gated dot products between several embeddings of the query and of the item."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch.nn import functional as F

from generative_recommenders.config.fields import HiddenWidth, OptionGroup, Positive, Share, Width
from generative_recommenders.config.registry import register_similarity
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.similarity.interface import (
    AuxiliaryLosses,
    SharedRows,
    Similarity,
    Snapshot,
)
from generative_recommenders.modeling.similarity.mol_components import (
    ItemComponents,
    ItemOptions,
    MoLComponents,
    QueryComponents,
    QueryOptions,
    UserOptions,
)
from generative_recommenders.modeling.similarity.mol_layers import CombinationName, two_layers
from generative_recommenders.ops import dispatch, numbered_rows
from generative_recommenders.ops.dropout import dropout
from generative_recommenders.ops.embedding import lookup_rows
from generative_recommenders.ops.normalization import layer_norm
from generative_recommenders.ops.recomputation import recomputed

_EPS = 1e-6
"""Within logarithms of the mixture's entropy."""

BLOCK_FLOATS = 2**25
"""Floats of temporaries a block of (query, item) pairs may take; more pairs are scored block by block."""

KEPT_FLOATS = 2**30
"""Floats that the blocks of a call may keep for the backward pass; the blocks beyond are computed again."""


ItemsOf = Callable[[slice, slice], ItemComponents]
"""The items of a block of rows and columns: ``[c, ...]`` shared by the rows, or ``[r, c, ...]``."""


class GatingOptions(OptionGroup):
    """The gate over the entries of the mixture: two layers each of the query, the item and the logits (``qi``)."""

    prefix: ClassVar[str] = "gating_"

    query_hidden_dim: HiddenWidth = 128
    """Hidden width of the query's gate; 0 or below for no hidden layer."""
    query_fn: bool = True
    """False leaves the query's gate out."""
    item_hidden_dim: HiddenWidth = 128
    """Hidden width of the item's gate; 0 or below for no hidden layer."""
    item_fn: bool = True
    """False leaves the item's gate out."""
    item_dropout_rate: Share = 0.0
    """Dropout before the item's gate."""
    qi_hidden_dim: HiddenWidth = 128
    """Hidden width of the gate over the logits, the cross term; 0 or below for no hidden layer."""
    qi_dropout_rate: Share = 0.0
    """Dropout before the gate over the logits."""
    combination_type: CombinationName = "glu_silu"
    """The combination of the gates: SiLU of (query's times item's plus logits'), or of its layer norm, or their sum."""


@register_similarity("MoL", gin_name="create_mol_interaction_module")
class MoLSimilarity(Similarity, MoLComponents):
    """Mixture of logits over query embeddings ``[n, D]`` and item embeddings ``[R, D']``, with the published options.

    With components f_q ``[Pq, d]`` and f_x ``[Pi, d]`` and E = Pq * Pi entries e = (n, m):
    ``l_e = <f_q[n], f_x[m]> / temperature``, ``p = softmax(gate(q, x, l))``,
    ``score = sum_e p_e l_e / score_temperature`` (arXiv 2306.04039, 2407.15462). Where (query, item) pairs are many,
    they are scored block by block; beyond `KEPT_FLOATS` blocks are computed again in the backward pass, so that memory
    is bounded. UserError for options that cannot be together.

    dot_product_dimension: width of a component, d.
    dot_product_l2_norm: components are normalised, so that logits are cosines over the temperature.
    temperature: what logits are divided by.
    score_temperature: what the mixture's sum is divided by.
    softmax_dropout_rate: dropout on the mixture's entries.
    bf16_training: products in bfloat16, in evaluation too, as published.
    eps: least norm and least sum that is divided by.
    activation_checkpoint: activations are always computed again in the backward pass, not only for very many pairs.
    mutual_information: whether training returns ``mi_loss``, which balances the load of the mixture.
    """

    def __init__(
        self,
        query_embedding_dim: int,
        item_embedding_dim: int,
        mutual_information: bool = True,
        query: QueryOptions = QueryOptions(),  # noqa: B008  (frozen)
        item: ItemOptions = ItemOptions(),  # noqa: B008
        gating: GatingOptions = GatingOptions(),  # noqa: B008
        users: UserOptions = UserOptions(),  # noqa: B008
        dot_product_dimension: Width = 64,
        dot_product_l2_norm: bool = True,
        temperature: Positive = 0.05,
        softmax_dropout_rate: Share = 0.0,
        bf16_training: bool = False,
        eps: Positive = 1e-6,
        activation_checkpoint: bool = False,
        score_temperature: Positive = 1.0,
    ) -> None:
        if gating.combination_type != "none" and not (gating.query_fn and gating.item_fn):
            raise UserError(
                f"MoL gating_combination_type = {gating.combination_type} multiplies two gates: "
                "set gating_query_fn and gating_item_fn, or use none"
            )
        widths = query_embedding_dim, item_embedding_dim, dot_product_dimension
        super().__init__(query, item, users, widths, dot_product_l2_norm, temperature, eps)
        self.temperature, self.combination = score_temperature, gating.combination_type
        self.mutual_information, self.activation_checkpoint = mutual_information, activation_checkpoint
        self.bf16_training, self.softmax_dropout_rate = bf16_training, softmax_dropout_rate
        self.item_dropout = max(item.dropout_rate, gating.item_dropout_rate) > 0
        self.item_gate_dropout = gating.item_dropout_rate > 0
        self.item_dropout_shared = item.dropout_shared
        logits = query.dot_product_groups * item.dot_product_groups
        self.query_gate = (
            two_layers(query_embedding_dim, gating.query_hidden_dim, logits, 0.0, bias=False)
            if gating.query_fn else None
        )  # fmt: skip
        self.item_gate = (
            two_layers(item_embedding_dim, gating.item_hidden_dim, logits, gating.item_dropout_rate, bias=False)
            if gating.item_fn else None
        )  # fmt: skip
        self.cross_gate = two_layers(logits, gating.qi_hidden_dim, logits, gating.qi_dropout_rate, bias=True)
        # Of a pair: what its temporaries take, and what its backward pass keeps; then what an item's components keep.
        cross, projected = 2 * max(gating.qi_hidden_dim, 0), item.dot_product_groups * dot_product_dimension
        hidden = 2 * max(item.hidden_dim, 0)
        self.kept_by_item_gate = 2 * max(gating.item_hidden_dim, 0) * gating.item_fn
        self.floats_per_pair = 6 * logits + cross + projected + hidden + self.kept_by_item_gate
        self.kept_per_pair = 10 * logits + cross
        self.kept_per_item = 2 * item_embedding_dim + 2 * projected + hidden + self.kept_by_item_gate

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
        sum_e pbar_e ln(pbar_e) minus the mean of sum_e p_e ln(p_e), with pbar the mean over all pairs of the call.
        """
        if items.dim() == 3 and items.shape[0] == 1:
            items = items[0]
        with self._autocast(queries):
            query, losses = self.query_components(queries, user_ids)
            if items.dim() == 2:
                scores, sums = self._mixed(query, len(items), _shared(self.item_components(items)))
            else:
                made = lambda r, c: self.item_components(items[r, c], normalized=False)  # noqa: E731
                scores, sums = self._mixed(query, items.shape[1], made, kept_per_item=self.kept_per_item)
        return scores, self.auxiliary_losses(losses | sums)

    def snapshot(self, embeddings: torch.Tensor) -> Snapshot:
        """The embeddings ``[V, D']`` and their components."""
        with self._autocast(embeddings):
            return Snapshot(embeddings, self.item_components(embeddings))

    def scores(self, queries: torch.Tensor, snapshot: Snapshot, user_ids: torch.Tensor | None) -> torch.Tensor:
        """``[n, V]`` scores of the snapshot's items."""
        with self._autocast(queries):
            query, _ = self.query_components(queries, user_ids)
        return self.score_components(query, snapshot.components)

    def auxiliary_losses(self, sums: dict[str, torch.Tensor]) -> AuxiliaryLosses:
        """The means of what `score_rows` summed up; see `score`."""
        losses = {}
        if "mi_loss" in sums:
            used, negative_entropy, pairs = sums["mi_loss"].tensor_split((-2, -1))
            mean = used / pairs.clamp(min=1)
            losses["mi_loss"] = (mean * torch.log(mean + _EPS)).sum() - (negative_entropy / pairs.clamp(min=1)).sum()
        if "uid_embedding_l2_norm" in sums:
            squares, users = sums["uid_embedding_l2_norm"].unbind()
            losses["uid_embedding_l2_norm"] = squares / users.clamp(min=1)
        return losses

    def score_rows(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor,
        user_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``[n, P]`` scores of ``items[rows]``, rows ``[n, P]`` int64, and the sums of the auxiliary losses over these
        pairs.

        Where an item's dropout is drawn for every pair, its components are made for every pair, too; otherwise once
        however often it is scored, which is several times faster.
        """
        with self._autocast(queries):
            query, losses = self.query_components(queries, user_ids)
            scores, sums = self._of_rows(query, items, rows, purpose=0)
        return scores, losses | sums

    def score_negatives(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        rows: torch.Tensor | SharedRows,
        user_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[n, R]`` scores under draws of dropout of their own, the query's and user's included, as published.

        Shared items are scored by one product for their span, without gathering them for every pair.
        """
        with self._autocast(queries):
            query, _ = self.query_components(queries, user_ids)
            if isinstance(rows, torch.Tensor):
                return self._of_rows(query, items, rows, purpose=1)[0]
            with numbered_rows.of_items():
                parts = self.item_components(items)
            scores = [
                self._mixed(query, len(ids), _shared(parts.select(ids)), span, purpose=1)[0] for span, ids in rows
            ]
        return torch.cat(scores)

    def _of_rows(
        self, query: QueryComponents, items: torch.Tensor, rows: torch.Tensor, purpose: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        drops = self.training and self.item_dropout
        # Few pairs are made one by one; but how many a process has must not decide what numbered rows draw.
        few = rows.numel() <= len(items) and numbered_rows.current() is None
        if not self.item_dropout_shared if drops else few:
            # A gate without dropout is the same in every pair of an item.
            gates = None
            if self.item_gate is not None and not self.item_gate_dropout and rows.numel() > len(items):
                gates = self.item_gate(items)

            def made(r: slice, c: slice) -> ItemComponents:
                pairs = rows[r, c]
                gate = None if gates is None else lookup_rows(gates, pairs)
                return self.item_components(lookup_rows(items, pairs), normalized=False, gate=gate)

            kept = self.kept_per_item - (0 if gates is None else self.kept_by_item_gate)
            return self._mixed(query, rows.shape[1], made, purpose=purpose, kept_per_item=kept)
        with numbered_rows.of_items():
            parts = self.item_components(items)
        return self._mixed(query, rows.shape[1], lambda r, c: parts.select(rows[r, c]), purpose=purpose)

    def score_components(
        self, query: QueryComponents, items: ItemComponents, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores from components made before.

        items: of R shared items; or, with rows ``[n, R']`` int64, of any number of items, of which query i
            scores ``rows[i]``. Gathering and scoring run block by block. Returns ``[n, R]`` or ``[n, R']``.
        """
        with self._autocast(query.components):
            if rows is None:
                return self._mixed(query, len(items.components), _shared(items))[0]
            return self._mixed(query, rows.shape[1], lambda r, c: items.select(rows[r, c]))[0]

    def _autocast(self, like: torch.Tensor) -> AbstractContextManager:
        return dispatch.autocast(like, torch.bfloat16) if self.bf16_training else nullcontext()

    def _mixed(
        self,
        query: QueryComponents,
        num_items: int,
        items_of: ItemsOf,
        span: slice | None = None,
        purpose: int = 0,
        kept_per_item: int = 0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``[m, num_items]`` scores of the m queries of a span (all by default), and the sums of ``mi_loss``.

        purpose: of the pairs, for dropout: 0 for positives, 1 for negatives. kept_per_item: floats that items_of keeps
        of each pair.
        """
        first, stop = (0, len(query.components)) if span is None else (span.start, span.stop)
        # As many columns as there are, and rows such that the temporaries of a block stay near BLOCK_FLOATS.
        pairs = max(1, BLOCK_FLOATS // self.floats_per_pair)
        columns = min(max(num_items, 1), pairs)
        column_blocks = _slices(0, num_items, columns)
        room = 0 if self.activation_checkpoint else KEPT_FLOATS
        scores, sums = [], []
        for rows in _slices(first, stop, max(1, pairs // columns)):
            done = []
            for block in column_blocks:
                room -= (rows.stop - rows.start) * (block.stop - block.start) * (self.kept_per_pair + kept_per_item)
                again = torch.is_grad_enabled() and room < 0
                arguments = query, items_of, rows, block, purpose
                done.append(recomputed(self._mix, *arguments) if again else self._mix(*arguments))
            scores.append(torch.cat([of_block for of_block, _ in done], dim=1))
            sums += [of_block for _, of_block in done if of_block is not None]
        return torch.cat(scores), {"mi_loss": torch.stack(sums).sum(0)} if sums else {}

    def _mix(
        self, query: QueryComponents, items_of: ItemsOf, rows: slice, columns: slice, purpose: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores ``[r, c]`` float32 of a block of rows and columns; for ``mi_loss`` also ``[E + 2]``, the sums of p and
        of p ln p over its pairs, and their number."""
        query_gate = None if query.gate is None else query.gate[rows][:, None]
        with numbered_rows.of_block(rows, 2 * columns.start + purpose):
            items = items_of(rows, columns)
            logits = self.component_logits(query.components[rows], items)
            gate = self.cross_gate(logits)
            if self.combination == "none":
                gate = sum((part for part in (query_gate, items.gate) if part is not None), gate)
            else:
                assert query_gate is not None and items.gate is not None  # as the constructor makes sure
                gate = query_gate * items.gate + gate
                if self.combination == "glu_silu":
                    gate = F.silu(gate)
                else:
                    gate = gate * torch.sigmoid(layer_norm(gate, eps=1e-5))
            p = _at_least_float32(gate).softmax(-1)
            if self.softmax_dropout_rate and self.training:
                p = dropout(p, self.softmax_dropout_rate, self.training)
                p = p / p.sum(-1, keepdim=True).clamp(min=self.eps)  # a mixture again
        scores = _at_least_float32((p * logits).sum(-1))
        if self.temperature != 1:
            scores = scores / self.temperature
        # mi_loss is over the positives alone, as published.
        if not (self.training and self.mutual_information) or purpose:
            return scores, None
        negative_entropy = (p * torch.log(p + _EPS)).sum()
        pairs = p.new_full((1,), scores.numel())
        return scores, torch.cat([p.sum((0, 1)), negative_entropy[None], pairs])


def _shared(items: ItemComponents) -> ItemsOf:
    return lambda rows, columns: items.select(columns)


def _slices(first: int, stop: int, step: int) -> list[slice]:
    """Slices of ``step`` over first..stop; one empty slice where there is nothing."""
    return [slice(start, min(start + step, stop)) for start in range(first, max(stop, first + 1), step)]


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
