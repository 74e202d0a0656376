"""What happens to the encoder's output before it is scored."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class L2NormEmbeddingPostprocessor(torch.nn.Module):
    """``v / max(|v|, eps)`` on ``[..., D]``."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)


class LayerNormEmbeddingPostprocessor(torch.nn.Module):
    """Layer norm without weights over the last axis of ``[..., D]``."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)
