"""Position-wise feed-forward networks. All of them act on the last axis: ``[T, D]`` and ``[B, N, D]``
alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..features import UserError
from .dropout import Dropout

FLOAT32_EPS = torch.finfo(torch.float32).eps
"""The epsilon of the RMS norms here, whatever the dtype of the activations."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class PointWiseFeedForward(nn.Module):
    """x + W2 act(W1 x + b1) + b2, the feed-forward of SASRec (arXiv 1808.09781, section 3.3) with its
    residual.

    embedding_dim: width D of input and output.
    dropout: rate behind the activation and behind the second layer.
    activation: "gelu" (erf form) or "relu".
    hidden_dim: width between the layers, D unless given.
    """

    def __init__(
        self,
        embedding_dim: int,
        dropout: float,
        activation: Literal["relu", "gelu"] = "gelu",
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"activation {activation!r} of PointWiseFeedForward: choose one of {sorted(_ACTIVATIONS)}"
            )
        hidden_dim = hidden_dim or embedding_dim
        self.activation = _ACTIVATIONS[activation]
        self.linear1 = nn.Linear(embedding_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embedding_dim)
        self.dropout = Dropout(dropout)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.dropout(self.activation(self.linear1(input_embeddings)))
        return self.dropout(self.linear2(hidden), residual=input_embeddings)


class SwiGLU(nn.Module):
    """W2 (silu(WG x) * W1 x), biases everywhere, no residual (arXiv 2002.05202, eq. 6).

    embedding_dim: width D of input and output; hidden_dim: width of the gated layer, 2 D in DiffTransformer.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.WG = nn.Linear(embedding_dim, hidden_dim)
        self.W1 = nn.Linear(embedding_dim, hidden_dim)
        self.W2 = nn.Linear(hidden_dim, embedding_dim)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self.W2(F.silu(self.WG(input_embeddings)) * self.W1(input_embeddings))


class SwiGLUEncoder(nn.Module):
    """Two residual SwiGLU layers, each with an RMS norm behind: y = RMS(S1(x) + x), out = RMS(S2(y) + y)."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.sw1 = SwiGLU(embedding_dim, hidden_dim)
        self.norm1 = nn.RMSNorm(embedding_dim, eps=FLOAT32_EPS)
        self.sw2 = SwiGLU(embedding_dim, hidden_dim)
        self.norm2 = nn.RMSNorm(embedding_dim, eps=FLOAT32_EPS)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.norm1(self.sw1(input_embeddings) + input_embeddings)
        return self.norm2(self.sw2(hidden) + hidden)
