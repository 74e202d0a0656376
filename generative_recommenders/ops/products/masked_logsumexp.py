"""The logarithm of a sum of exponentials over the entries of a mask."""

from __future__ import annotations

import math

import torch

from generative_recommenders.ops import dispatch


def masked_logsumexp(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``ln sum exp`` over the True entries of each row.

    scores: ``[T, R]`` float. mask: ``[T, R]`` bool. Returns ``[T]``; -inf, with gradients of 0, for a row without any.
    """
    if dispatch.fast():
        return _MaskedLogSumExp.apply(scores, mask)
    return masked_logsumexp_reference(scores, mask)


def masked_logsumexp_reference(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`masked_logsumexp` in plain torch."""
    some = mask.any(1)
    shown = torch.where(mask | ~some[:, None], torch.where(mask, scores, 0.0), -math.inf)
    return torch.where(some, shown.logsumexp(1) if scores.shape[1] else -math.inf, -math.inf)


class _MaskedLogSumExp(torch.autograd.Function):
    """One softmax for value and gradient, ``ln sum exp(s) = max s - ln max p``; rows with False entries are done
    apart."""

    @staticmethod
    def forward(ctx, scores, mask):
        if not scores.numel():
            ctx.save_for_backward(scores)
            return scores.new_full((len(scores),), -math.inf)
        # Rows with False entries; all of them on a device that a look would wait for.
        rows: torch.Tensor | slice = slice(None)
        if not dispatch.waits(mask):
            rows = mask.view(torch.int8).amin(1).logical_not().nonzero().squeeze(1)
        ctx.rows = rows
        hidden = mask[rows].logical_not()
        shown = scores[rows].masked_fill(hidden, -math.inf)
        p, largest = torch.softmax(shown, 1), shown.amax(1)
        if not isinstance(rows, slice):
            p = torch.softmax(scores, 1).index_copy_(0, rows, p)
            largest = scores.amax(1).index_copy_(0, rows, largest)
        none = largest == -math.inf  # nothing counts: softmax gives NaN
        if dispatch.waits(scores):
            p = p.masked_fill(none[:, None], 0.0)
        elif none.any():
            p[none] = 0.0
        ctx.save_for_backward(p, hidden)
        return torch.where(none, largest, largest - p.amax(1).log())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        p, *hidden = ctx.saved_tensors
        grads = p * grad[:, None]
        for entries in hidden:  # 0 also where the gradient of the row is not a number
            grads[ctx.rows] = grads[ctx.rows].masked_fill(entries, 0.0)
        return grads, None
