"""Layer norm without weights (arXiv 1607.06450) and L2 norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis; variance of the population."""
    if not dispatch.fast():
        return layer_norm_reference(x, eps)
    if dispatch.takes_kernels(x) and x.dtype != torch.float64:
        from generative_recommenders.ops.normalization_kernels import MAX_WIDTH, FusedLayerNorm

        if x.shape[-1] <= MAX_WIDTH:
            return FusedLayerNorm.apply(x.float() if torch.is_autocast_enabled("cuda") else x, eps)
    width = x.shape[-1:]  # torch's CPU kernel takes twice as long without weights, so it gets some that change nothing
    return F.layer_norm(x, width, x.new_ones(width), x.new_zeros(width), eps)


def layer_norm_reference(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`layer_norm` as its equation."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


class LayerNorm(torch.nn.Module):
    """Module form of `layer_norm`."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean x² + eps) * weight`` over the last axis. weight: ``[D]``."""
    if not dispatch.fast_on_cpu_in_one_dtype(x):
        return rms_norm_reference(x, weight, eps)
    return _RmsNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _RmsNorm(torch.autograd.Function):
    """With y = x / sigma and g = w dy: ``dx = (g - y mean(g y)) / sigma``, in fewer passes than torch's."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        # One pass over x where x.square().mean() takes two.
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse, weight)
        return y * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, inverse, weight = ctx.saved_tensors
        products = grad * y
        along = (products @ weight).div_(weight.numel())[:, None]
        d_x = torch.mul(grad, weight).addcmul_(y, along, value=-1.0).mul_(inverse)
        return d_x, column_sums(products), None


class RMSNorm(torch.nn.RMSNorm):
    """Module form of `rms_norm`, with weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """``x.sum(0)`` of ``[T, D]``, in eight parts that threads share."""
    whole = len(x) // 8 * 8
    return x[:whole].unflatten(0, (8, -1)).sum(1).sum(0) + x[whole:].sum(0)


def l2_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / max(|x|, eps)`` over the last axis."""
    return _L2Normalize.apply(x, eps) if dispatch.fast() else l2_normalize_reference(x, eps)


def l2_normalize_reference(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`l2_normalize` in plain torch."""
    return F.normalize(x, dim=-1, eps=eps)


class _L2Normalize(torch.autograd.Function):
    """``dx = (dy - y (dy · y)) / |x|``; ``dx = dy / eps`` where the norm is below eps: fewer passes than torch's."""

    @staticmethod
    def forward(ctx, x, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        divisor = norm.clamp_min(eps)
        y = x / divisor
        ctx.save_for_backward(y, divisor, norm >= eps)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, divisor, normalized = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True) * normalized
        return torch.addcmul(grad, y, along, value=-1.0).div_(divisor), None
