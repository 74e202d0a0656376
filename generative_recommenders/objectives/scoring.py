"""Scores of positives and negatives by matrix products, not by gathered rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.similarity.interface import Similarity, rounded
from generative_recommenders.objectives.negative_samplers import Negatives
from generative_recommenders.ops.embedding import range_of
from generative_recommenders.ops.products.sampled import (
    block_products,
    join_blocks,
    many_rows,
    sampled_products,
    scored_products,
    split_blocks,
)


@dataclass(frozen=True)
class SampledScores:
    """positive ``[T, P]``, negative ``[T, R]``, negative_mask ``[T, R]`` bool (True counts). sums: what the similarity
    makes its auxiliary losses from."""

    positive: torch.Tensor
    negative: torch.Tensor
    negative_mask: torch.Tensor
    sums: dict[str, torch.Tensor]


def sampled_scores(
    states: torch.Tensor,
    items: ItemRows,
    positives: torch.Tensor,
    negatives: Negatives,
    similarity: Similarity,
    user_ids: torch.Tensor,
    raw_positives: bool = False,
) -> SampledScores:
    """Scores of a step's positives and negatives.

    states: ``[T, D]``. items: normalised here, if they are not. positives: ``[T]`` or ``[T, P]`` item ids. user_ids:
    ``[T]``.
    raw_positives: the positives' items are scored as they are.

    A similarity that is no product scores positives and negatives in two calls, as the published program does, and
    keeps memory within bounds; its auxiliary losses are of the positives alone. UserError for ids that are no items.
    """
    targets = positives if positives.dim() == 2 else positives[:, None]
    reach = range_of(targets) if items.ids is None else None
    if reach is not None:
        last = len(items.weight if items.row_of_item is None else items.row_of_item) - 1
        if reach[0] < 0 or reach[1] > last:
            raise UserError(f"positives: item ids reach from {reach[0]} to {reach[1]}, outside 0..{last}")
    mask = no_collisions(targets, negatives)
    # Of a large catalogue no normalised copy of the rows is made: products are divided by the norms of their rows.
    fused = negatives.sharing.granularity == "position" and not raw_positives
    if fused and many_rows(items.weight, negatives.ids):
        operands = similarity.operands(states, items.weight)
        if operands is not None and operands[1] is items.weight:
            rows = items.index(targets), items.index(negatives.ids)
            positive, negative = scored_products(*operands, *rows, items.norm_eps)
            return SampledScores(positive, corrected(negative, negatives), mask, {})
    raw, items = items, items.normalized()
    operands = similarity.operands(states, items.weight)
    sums: dict[str, torch.Tensor] = {}
    if operands is not None:
        (query, weight), dtype = operands, similarity.score_dtype
        # Positives are few: a product of rows each, where negatives take a matrix product.
        if raw_positives:
            own = rounded(raw.lookup(targets).float(), dtype)
        else:
            own = replace(items, weight=weight).lookup(targets)
        positive = (query[:, None] * own).sum(-1)
        negative = negative_products(query, weight, items.index(negatives.ids), negatives)
        positive, negative = rounded(positive, dtype), rounded(negative, dtype)
    else:
        weight, drawn = items.weight.float(), items.index(negatives.ids)
        own = raw.weight.float() if raw_positives else weight
        positive, sums = similarity.score_rows(states, own, items.index(targets), user_ids)
        spans = negatives.spans(len(states))
        if not len(states):  # [0, R], where a batch or a block has drawn negatives and no token
            spans, drawn = None, drawn[:0]
        shared = drawn if spans is None else zip(spans, drawn)
        negative = similarity.score_negatives(states, weight, shared, user_ids)
    return SampledScores(positive, corrected(negative, negatives), mask, sums)


def negative_products(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, negatives: Negatives
) -> torch.Tensor:
    """``[T, R]`` products of tokens ``hidden [T, D]`` with the rows ``[G, R]`` of ``weight [U, D]`` drawn for them."""
    granularity = negatives.sharing.granularity
    if granularity == "position":
        return sampled_products(hidden, weight, rows)
    if granularity == "batch":
        return hidden @ ItemRows(weight).lookup(rows[0]).T
    drawn = ItemRows(weight).lookup(rows)
    return block_products(hidden, drawn, negatives.sharing.block_size, negatives.lead)


def corrected(scores: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """``s - ln(R q)``: importance weights of the sampled part of the partition function (Bengio & Senécal 2008)."""
    if negatives.log_q is None:
        return scores
    return scores - negatives.per_token(negatives.log_q, scores.shape[0])


def no_collisions(targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """``[T, R]`` bool, False where a negative is one of the token's positives ``[T, P]``."""
    ids, targets, tokens = negatives.ids.int(), targets.int(), len(targets)  # compared in half the time
    if negatives.sharing.granularity == "block":
        targets = split_blocks(targets, len(ids), negatives.sharing.block_size, negatives.lead)
        ids = ids[:, None]
    mask = _differ(ids, targets[..., :1])
    for column in range(1, targets.shape[-1]):
        mask &= _differ(ids, targets[..., column, None])
    return join_blocks(mask, tokens, negatives.lead) if mask.dim() == 3 else mask


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a != b``, bool; by way of integers, as torch's CPU kernel compares eight at a time into its own dtype alone."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.ne(a, b, out=a.new_empty(shape)).bool()
