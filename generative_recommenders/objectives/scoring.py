"""Scores of positives and negatives by matrix products, not by gathered rows.

Per position, each of T tokens has R negatives of its own: the ``[T, R]`` scores are the sampled entries of
``hidden · weightᵀ``, a sparse pattern, so the forward pass is one sampled dense-dense product and the
backward pass two sums over weighted bags of rows; no ``[T, R, D]`` tensor exists. Shared by blocks or by the batch
they are batched products.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.items import ItemRows, bags_of_rows
from generative_recommenders.modeling.output_postprocessors import l2_normalize
from generative_recommenders.objectives.negative_samplers import Negatives

AuxiliaryLosses = dict[str, torch.Tensor]

_PART = 1 << 18
"""Entries of a pattern, at least, that are sorted together: 1 MiB of gradients."""


@dataclass(frozen=True)
class SampledScores:
    """positive ``[T, P]``, negative ``[T, R]``, negative_mask ``[T, R]`` bool (True counts), auxiliary
    losses.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    negative_mask: torch.Tensor
    auxiliary: AuxiliaryLosses


class Scorer(ABC):
    """Scores the positives and negatives of a step's positions."""

    @abstractmethod
    def scores(
        self,
        hidden: torch.Tensor,
        items: ItemRows,
        positives: torch.Tensor,
        negatives: Negatives,
        similarity: torch.nn.Module,
        user_ids: torch.Tensor,
    ) -> SampledScores:
        """hidden ``[T, D]``, positives ``[T]`` or ``[T, P]`` item ids, user_ids ``[T]``."""


class ProductScorer(Scorer):
    """Dot products: ``hidden · item / temperature``.

    normalize_positives, normalize_negatives: divide item embeddings by max(norm, eps).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        normalize_positives: bool = True,
        normalize_negatives: bool = True,
        eps: float = 1e-6,
    ) -> None:
        self.temperature = temperature
        self.normalize_positives = normalize_positives
        self.normalize_negatives = normalize_negatives
        self.eps = eps

    def scores(self, hidden, items, positives, negatives, similarity, user_ids):
        hidden = hidden.float() / self.temperature
        plain = replace(items, weight=items.weight.float())
        normalized = replace(items, weight=l2_normalize(plain.weight, self.eps))
        targets = checked_targets(positives, items)
        source = normalized if self.normalize_positives else plain
        positive = (hidden[:, None] * source.lookup(targets)).sum(-1)
        source = normalized if self.normalize_negatives else plain
        negative = negative_products(hidden, source.weight, source.index(negatives.ids), negatives)
        return SampledScores(positive, corrected(negative, negatives), no_collisions(targets, negatives), {})


class LearnedScorer(Scorer):
    """Any similarity, each position with its own positives and negatives by `Similarity.score_rows`.

    What depends on an item alone is computed once for each item held; the similarity keeps memory within
    bounds. Auxiliary losses are over all (position, item) pairs of the step.
    """

    def __init__(self, temperature: float, item_l2_norm: bool, eps: float) -> None:
        self.temperature, self.item_l2_norm, self.eps = temperature, item_l2_norm, eps

    def scores(self, hidden, items, positives, negatives, similarity, user_ids):
        weight = items.weight.float()
        if self.item_l2_norm:
            weight = l2_normalize(weight, self.eps)
        targets = checked_targets(positives, items)
        rows, drawn, spans = items.index(targets), items.index(negatives.ids), negatives.spans(len(hidden))
        if not len(hidden):  # no pairs, of the shape that the rest expects
            drawn, spans = drawn[:0], None
        if spans is None:
            rows = torch.cat([rows, drawn], dim=1)
        scores, auxiliary = similarity.score_rows(hidden, weight, rows, user_ids, zip(spans or (), drawn))
        positive, negative = (scores / self.temperature).split([targets.shape[1], drawn.shape[1]], dim=1)
        return SampledScores(
            positive, corrected(negative, negatives), no_collisions(targets, negatives), auxiliary
        )


def checked_targets(positives: torch.Tensor, items: ItemRows) -> torch.Tensor:
    """``[T, P]`` of ``positives [T]`` or ``[T, P]``. UserError for ids that are no items, looked for where all
    items are held on a CPU: elsewhere a look would wait for the device.
    """
    targets = positives if positives.dim() == 2 else positives[:, None]
    if items.ids is None and targets.device.type == "cpu" and targets.numel():
        last = len(items.weight if items.row_of_item is None else items.row_of_item) - 1
        lowest, highest = (int(each) for each in targets.aminmax())
        if lowest < 0 or highest > last:
            raise UserError(f"positives: item ids reach from {lowest} to {highest}, outside 0..{last}")
    return targets


def negative_products(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, negatives: Negatives
) -> torch.Tensor:
    """``[T, R]`` products of ``hidden [T, D]`` with the rows ``[G, R]`` of ``weight [U, D]`` each token
    competes with.
    """
    granularity = negatives.sharing.granularity
    if granularity == "position":
        if rows.shape[1] >= weight.shape[0]:  # all products are fewer, and torch samples no more than all
            return (hidden @ weight.T).gather(1, rows)
        return SampledProducts.apply(hidden, weight, rows)
    if granularity == "batch":
        return hidden @ ItemRows(weight).lookup(rows[0]).T
    return BlockProducts.apply(hidden, ItemRows(weight).lookup(rows), negatives)


def corrected(scores: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """``s - ln(R q)``: importance weights of the sampled part of the partition function (Bengio & Senécal
    2008).
    """
    if negatives.log_q is None:
        return scores
    return scores - negatives.per_token(negatives.log_q, scores.shape[0])


def no_collisions(targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """``[T, R]`` bool, False where a negative is one of the token's positives ``[T, P]``."""
    ids, targets, tokens = negatives.ids.int(), targets.int(), len(targets)  # compared in half the time
    if negatives.sharing.granularity == "block":
        ids, targets = ids[:, None], negatives.blocks(targets)
    mask = _differ(ids, targets[..., :1])
    for column in range(1, targets.shape[-1]):
        mask &= _differ(ids, targets[..., column, None])
    return negatives.tokens(mask, tokens) if mask.dim() == 3 else mask


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a != b``, bool; by way of integers, as torch's CPU kernel compares eight at a time into its own dtype alone."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.ne(a, b, out=a.new_empty(shape)).bool()


class BlockProducts(torch.autograd.Function):
    """``[T, R]`` products of ``hidden [T, D]`` with the ``drawn [G, R, D]`` rows of each token's block.

    Gradients of whole blocks are read where they lie; only those of a block that is cut off are copied.
    """

    @staticmethod
    def forward(ctx, hidden, drawn, negatives):
        ctx.save_for_backward(hidden, drawn)
        ctx.negatives = negatives
        scores = torch.bmm(negatives.blocks(hidden), drawn.mT)
        return negatives.tokens(scores, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, drawn = ctx.saved_tensors
        d_hidden, d_drawn = torch.empty_like(hidden), torch.empty_like(drawn)
        spans = ctx.negatives.spans(len(hidden))
        size = ctx.negatives.sharing.block_size
        whole = [span.stop - span.start == size for span in spans]
        first, stop = (whole.index(True), len(whole) - whole[::-1].index(True)) if any(whole) else (0, 0)
        if stop > first:
            span, some = slice(spans[first].start, spans[stop - 1].stop), slice(first, stop)
            blocks = grad[span].unflatten(0, (-1, size))
            torch.bmm(blocks, drawn[some], out=d_hidden[span].unflatten(0, (-1, size)))
            torch.bmm(blocks.mT, hidden[span].unflatten(0, (-1, size)), out=d_drawn[some])
        for index in [*range(first), *range(stop, len(spans))]:
            span = spans[index]
            d_hidden[span] = grad[span] @ drawn[index]
            d_drawn[index] = grad[span].mT @ hidden[span]
        return d_hidden, d_drawn, None


class SampledProducts(torch.autograd.Function):
    """``out[t, r] = hidden[t] · weight[rows[t, r]]`` with ``hidden [T, D]``, ``weight [U, D]``, ``rows [T,
    R]``.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rows):
        ctx.save_for_backward(hidden, weight, rows)
        return _sampled_products(hidden, weight, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, rows = ctx.saved_tensors
        d_hidden = F.embedding_bag(rows, weight, per_sample_weights=grad, mode="sum")
        parts = zip(*(_parts(x, rows.numel(), len(weight)) for x in (rows, grad, hidden)))
        d_weight, *others = (_transposed_product(of, d, h, len(weight)) for of, d, h in parts)
        for other in others:
            d_weight += other
        return d_hidden, d_weight, None


def _sampled_products(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``[T, R]``, by a sparse pattern of 0 in CSR form."""
    tokens, draws = rows.shape
    pointers = torch.arange(0, tokens * draws + 1, draws, dtype=torch.int32, device=rows.device)
    columns, zeros = rows.flatten().to(torch.int32), hidden.new_zeros(tokens * draws)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            pointers, columns, zeros, size=(tokens, len(weight)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, hidden, weight.T, beta=0.0).values().view(tokens, draws)


def _parts(x: torch.Tensor, entries: int, num_rows: int) -> tuple[torch.Tensor, ...]:
    """``x [T, ...]`` in parts whose entries of a pattern stay in a processor's cache; each costs a pass over all rows."""
    size = max(_PART, 8 * num_rows)
    return x.chunk(max(1, entries // size if x.device.type == "cpu" else 1))


def _transposed_product(
    rows: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """``[U, D]``: sum over (t, r) of grad[t, r] · hidden[t] into row rows[t, r], by sorting the pattern by
    row.
    """
    order, starts = bags_of_rows(rows.flatten(), num_rows)
    draws = rows.shape[1]
    shift = draws.bit_length() - 1
    tokens = order >> shift if draws == 1 << shift else order // draws  # a division takes five times as long
    weights = grad.flatten().index_select(0, order)
    return F.embedding_bag(
        tokens, hidden, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
