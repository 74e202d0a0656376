"""What happens to the encoder's output before it is scored."""

from __future__ import annotations

import torch

from generative_recommenders.ops.normalization import layer_norm


def l2_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / max(|x|, eps)`` over the last axis: `torch.nn.functional.normalize`, with fewer passes over the gradient."""
    return _L2Normalize.apply(x, eps)


class _L2Normalize(torch.autograd.Function):
    """``dx = (dy - y (dy · y)) / |x|``; ``dx = dy / eps`` where the norm is below eps."""

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


class L2NormEmbeddingPostprocessor(torch.nn.Module):
    """``v / max(|v|, eps)`` on ``[..., D]``.

    embedding_dim: D, the first columns of wider states (those of a preprocessor that puts ratings beside the items), as in
    HSTU's public runs; all columns unless given.
    """

    def __init__(self, eps: float = 1e-6, embedding_dim: int | None = None) -> None:
        super().__init__()
        self.eps, self.embedding_dim = eps, embedding_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return l2_normalize(x[..., : self.embedding_dim], self.eps)


class LayerNormEmbeddingPostprocessor(torch.nn.Module):
    """Layer norm without weights over the last axis of ``[..., D]``; embedding_dim: as above."""

    def __init__(self, eps: float = 1e-6, embedding_dim: int | None = None) -> None:
        super().__init__()
        self.eps, self.embedding_dim = eps, embedding_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[..., : self.embedding_dim]
        return layer_norm(x, self.eps)
