"""RePlay's head: scores as dot products."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["EmbeddingTyingHead"]


class EmbeddingTyingHead(nn.Module):
    """Logits as dot products of hidden states and item embeddings."""

    def forward(self, hidden_states: torch.Tensor, item_embeddings: torch.Tensor) -> torch.Tensor:
        """hidden_states ``[B, D]`` or ``[B, N, D]``; item_embeddings ``[V, D]`` or ``[B, V, D]``.

        Returns ``[B, V]`` or ``[B, N, V]``.
        """
        if hidden_states.dim() == 2 and item_embeddings.dim() == 3:
            return torch.matmul(item_embeddings, hidden_states.unsqueeze(-1)).squeeze(-1)
        return torch.matmul(hidden_states, item_embeddings.transpose(-1, -2))
