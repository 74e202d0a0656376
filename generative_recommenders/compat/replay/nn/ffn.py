"""RePlay's feed-forward networks; those with SwiGLU are the program's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.ops.dropout import Dropout
from generative_recommenders.ops.feed_forward import SwiGLU, SwiGLUEncoder, feed_forward

__all__ = ["PointWiseFeedForward", "SwiGLU", "SwiGLUEncoder"]

Activation = Literal["relu", "gelu"]


class PointWiseFeedForward(nn.Module):
    """x + W2 act(W1 x + b1) + b2, the feed-forward of SASRec (arXiv 1808.09781, section 3.3) with its residual.

    embedding_dim: width D of input and output.
    dropout: rate after the activation and after the second layer.
    activation: "gelu" (erf form) or "relu".
    hidden_dim: width between the layers, D unless given.
    """

    def __init__(
        self, embedding_dim: int, dropout: float, activation: Activation = "gelu", hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        if activation not in (known := get_args(Activation)):
            raise UserError(f"activation {activation!r} of PointWiseFeedForward: choose one of {', '.join(known)}")
        hidden_dim = hidden_dim or embedding_dim
        self.activation: Callable[[Tensor], Tensor] = getattr(F, activation)
        self.linear1 = nn.Linear(embedding_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embedding_dim)
        self.dropout = Dropout(dropout)

    def forward(self, input_embeddings: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        rate = self.dropout.rate if self.training else 0.0
        return feed_forward(input_embeddings, self.linear1, self.linear2, self.activation, rate)
