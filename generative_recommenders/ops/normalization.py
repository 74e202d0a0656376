"""Layer norm without weights (arXiv 1607.06450) and L2 norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis; variance of the population."""
    if not dispatch.fast(x):
        return layer_norm_reference(x, eps)
    if dispatch.takes_kernels(x) and x.dtype != torch.float64:
        from generative_recommenders.ops.normalization_kernels import MAX_WIDTH, FusedLayerNorm

        if x.shape[-1] <= MAX_WIDTH:
            return FusedLayerNorm.apply(x.float() if torch.is_autocast_enabled("cuda") else x, eps)
    width = x.shape[-1:]  # without the weights that change nothing torch's CPU kernel takes twice as long
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


def l2_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / max(|x|, eps)`` over the last axis."""
    return _L2Normalize.apply(x, eps) if dispatch.fast(x) else l2_normalize_reference(x, eps)


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
