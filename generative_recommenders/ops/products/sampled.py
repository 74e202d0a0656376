"""Products of tokens with sampled rows of a table, the rows never gathered for each token.

Per position, each of T tokens has R rows of its own: the ``[T, R]`` products are the sampled entries of
``hidden · weightᵀ``, a sparse pattern, so the forward pass is one sampled dense-dense product and the backward pass two
sums over weighted bags of rows, all three by kernels of our own on a GPU; no ``[T, R, D]`` tensor exists. Where blocks
of tokens share their rows they are batched products.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.embedding import bags_of_rows
from generative_recommenders.ops.normalization import l2_normalize_reference

_OFTEN = 8
"""Rows are many where a sample reads each fewer than so many times."""
PART_ENTRIES = 1 << 18
"""Entries of a pattern, at least, that are sorted together: 1 MiB of gradients."""


def sampled_products(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[t, r] = hidden[t] · weight[rows[t, r]]``.

    hidden: ``[T, D]``. weight: ``[U, D]``. rows: ``[T, R]`` int64. Returns ``[T, R]``.
    """
    if not dispatch.fast():
        return sampled_products_reference(hidden, weight, rows)
    if rows.shape[1] >= weight.shape[0]:  # all products are fewer, and torch samples no more than all
        return (hidden @ weight.T).gather(1, rows)
    return _SampledProducts.apply(hidden, weight, rows)


def sampled_products_reference(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`sampled_products` in plain torch, by gathered rows."""
    return (hidden[:, None] * weight[rows]).sum(-1)


def many_rows(weight: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether passes over all of ``weight [U, D]`` cost more than passes over the sampled ``rows [T, R]``, on a CPU:
    then `scored_products` pays.
    """
    return dispatch.fast_on_cpu(weight) and rows.shape[1] < len(weight) and rows.numel() < _OFTEN * len(weight)


def scored_products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``hidden[t] · w / max(|w|, eps)`` with the rows w of ``weight`` that are a token's positives and negatives.

    The products are divided, not the rows, so that nothing but the gradient has the size of ``weight``.

    hidden: ``[T, D]``. weight: ``[U, D]``. positives: ``[T, P]`` and negatives: ``[T, R]`` int64. eps: None for the
    rows as they are. Returns ``[T, P]`` and ``[T, R]``.
    """
    if not dispatch.fast():
        return scored_products_reference(hidden, weight, positives, negatives, eps)
    return _ScoredProducts.apply(hidden, weight, positives, negatives, eps)


def scored_products_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scored_products` in plain torch, by normalised and gathered rows."""
    scored = weight if eps is None else l2_normalize_reference(weight, eps)
    positive, negative = (sampled_products_reference(hidden, scored, rows) for rows in (positives, negatives))
    return positive, negative


def block_products(hidden: torch.Tensor, drawn: torch.Tensor, block_size: int, lead: int) -> torch.Tensor:
    """``out[t, r] = hidden[t] · drawn[block of t, r]``.

    hidden: ``[T, D]``. drawn: ``[G, R, D]``, the rows of each block of block_size tokens; the first ``lead`` tokens of
    the first block are not among the T, nor need the last block be full. Returns ``[T, R]``.
    """
    if not dispatch.fast():
        return block_products_reference(hidden, drawn, block_size, lead)
    return _BlockProducts.apply(hidden, drawn, block_size, lead)


def block_products_reference(hidden: torch.Tensor, drawn: torch.Tensor, block_size: int, lead: int) -> torch.Tensor:
    """`block_products` in plain torch, by gathered rows."""
    block_of = (torch.arange(len(hidden), device=hidden.device) + lead) // block_size
    return (hidden[:, None] * drawn[block_of]).sum(-1)


def split_blocks(x: torch.Tensor, num_blocks: int, block_size: int, lead: int) -> torch.Tensor:
    """``[T, D]`` values of tokens as ``[G, block_size, D]``, 0 before the first token and after the last."""
    trailing = num_blocks * block_size - lead - x.shape[0]
    return F.pad(x, (0, 0, lead, trailing)).unflatten(0, (-1, block_size))


def join_blocks(blocks: torch.Tensor, num_tokens: int, lead: int) -> torch.Tensor:
    """``[G, block_size, D]`` as ``[T, D]``: the inverse of `split_blocks`."""
    return blocks.flatten(0, 1)[lead : lead + num_tokens]


class _BlockProducts(torch.autograd.Function):
    """Gradients of whole blocks are read where they lie; only those of a block that is cut off are copied."""

    @staticmethod
    def forward(ctx, hidden, drawn, block_size, lead):
        ctx.save_for_backward(hidden, drawn)
        ctx.block_size, ctx.lead = block_size, lead
        scores = torch.bmm(split_blocks(hidden, len(drawn), block_size, lead), drawn.mT)
        return join_blocks(scores, len(hidden), lead)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, drawn = ctx.saved_tensors
        d_hidden, d_drawn = torch.empty_like(hidden), torch.empty_like(drawn)
        size, lead = ctx.block_size, ctx.lead
        whole = range(1 if lead else 0, (lead + len(hidden)) // size)
        if whole:
            blocks = slice(whole.start, whole.stop)
            span = slice(whole.start * size - lead, whole.stop * size - lead)
            by_block = grad[span].unflatten(0, (-1, size))
            torch.bmm(by_block, drawn[blocks], out=d_hidden[span].unflatten(0, (-1, size)))
            torch.bmm(by_block.mT, hidden[span].unflatten(0, (-1, size)), out=d_drawn[blocks])
        cut = [index for index in range(len(drawn)) if index not in whole]  # the first and the last one, at most
        for index in cut:
            span = slice(max(index * size - lead, 0), (index + 1) * size - lead)
            d_hidden[span] = grad[span] @ drawn[index]
            d_drawn[index] = grad[span].mT @ hidden[span]
        return d_hidden, d_drawn, None, None


class _SampledProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows):
        ctx.by_kernels = dispatch.takes_kernels(hidden) and hidden.dtype == weight.dtype == torch.float32
        if ctx.by_kernels:
            from generative_recommenders.ops.products import kernels

            hidden, weight, rows = hidden.contiguous(), weight.contiguous(), rows.contiguous()
            ctx.save_for_backward(hidden, weight, rows)
            return kernels.products(hidden, weight, rows)
        ctx.save_for_backward(hidden, weight, rows)
        return _products_of_pattern(hidden, weight, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, rows = ctx.saved_tensors
        if ctx.by_kernels:
            from generative_recommenders.ops.products import kernels

            grad = grad.contiguous()
            bags = bags_of_rows(rows.flatten(), len(weight))
            return kernels.sums_of_rows(weight, rows, grad), kernels.sums_of_tokens(hidden, grad, *bags), None
        d_hidden = F.embedding_bag(rows, weight, per_sample_weights=grad, mode="sum")
        # entries of a part stay in a processor's cache; each part costs a pass over all rows
        size = max(PART_ENTRIES, 8 * len(weight))
        count = max(1, rows.numel() // size) if dispatch.fast_on_cpu(rows) else 1
        parts = zip(*(x.chunk(count) for x in (rows, grad, hidden)))
        d_weight, *others = (_transposed_product(of, d, h, len(weight)) for of, d, h in parts)
        for other in others:
            d_weight += other
        return d_hidden, d_weight, None


class _ScoredProducts(torch.autograd.Function):
    """With y = w / n, n = max(|w|, eps): ``dw = sum_t ds_t (h_t - y s_t) / n``, and without its second term where |w| <
    eps. So a row's own part is the sum of its ``ds s``, one number, times w / n².
    """

    @staticmethod
    def forward(ctx, hidden, weight, positives, negatives, eps):
        held = weight.index_select(0, positives.flatten()).view(*positives.shape, weight.shape[1])
        positive = (held * hidden[:, None]).sum(-1)
        negative = _products_of_pattern(hidden, weight, negatives)
        scales = []
        if eps is not None:
            norm = torch.linalg.vector_norm(weight, dim=1)
            inverse = norm.clamp_min(eps).reciprocal_()
            scales = [inverse.index_select(0, rows.flatten()).view_as(rows) for rows in (positives, negatives)]
            positive.mul_(scales[0]), negative.mul_(scales[1])
            scales += [positive, negative, torch.where(norm < eps, 0.0, inverse.square_())]
        ctx.save_for_backward(hidden, weight, positives, negatives, held, *scales)
        return positive, negative

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_positive, d_negative):
        hidden, weight, positives, negatives, held, *scales = ctx.saved_tensors
        places = positives.flatten(), negatives.flatten()
        along = None
        if scales:
            *scales, positive, negative, factors = scales
            along = weight.new_zeros(len(weight))
            for rows, grad, score in zip(places, (d_positive, d_negative), (positive, negative)):
                along.index_add_(0, rows, (grad * score).flatten())
            along.mul_(factors)
            d_positive, d_negative = d_positive * scales[0], d_negative * scales[1]
        d_hidden = F.embedding_bag(negatives, weight, per_sample_weights=d_negative, mode="sum")
        d_hidden += (held * d_positive[:, :, None]).sum(1)
        d_weight = _transposed_product(negatives, d_negative, hidden, len(weight))
        d_weight.index_add_(0, places[0], (d_positive[:, :, None] * hidden[:, None]).flatten(0, 1))
        if along is not None:
            d_weight.addcmul_(weight, along[:, None], value=-1.0)
        return d_hidden, d_weight, None, None, None


def _products_of_pattern(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``[T, R]``, by a sparse pattern of 0 in CSR form."""
    tokens, draws = rows.shape
    pointers = torch.arange(0, tokens * draws + 1, draws, dtype=torch.int32, device=rows.device)
    columns, zeros = rows.flatten().to(torch.int32), hidden.new_zeros(tokens * draws)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(pointers, columns, zeros, size=(tokens, len(weight)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, hidden, weight.T, beta=0.0).values().view(tokens, draws)


def _transposed_product(rows: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``[U, D]``: sum over (t, r) of grad[t, r] · hidden[t] into row rows[t, r], by sorting the pattern by row."""
    order, starts = bags_of_rows(rows.flatten(), num_rows)
    draws = rows.shape[1]
    shift = draws.bit_length() - 1
    tokens = order >> shift if draws == 1 << shift else order // draws  # a division takes five times as long
    weights = grad.flatten().index_select(0, order)
    return F.embedding_bag(tokens, hidden, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
