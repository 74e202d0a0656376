"""Layers of the mixture of logits: gated units, projections and gates.

The published programs draw every matrix of the mixture from Xavier's normal distribution once the model is made,
whatever its layers began with, so layers begin with that here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from generative_recommenders.ops.dropout import Dropout

GatedUnitName = Literal["swiglu", "geglu", "reglu", "glu"]
CombinationName = Literal["glu_silu", "glu_silu_ln", "none"]

GATED_UNITS: dict[GatedUnitName, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
}


class GatedUnit(nn.Module):
    """act(l) * r with [l, r] = x W + b (arXiv 2002.05202)."""

    def __init__(self, in_features: int, out_features: int, name: GatedUnitName) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)
        self.activation = GATED_UNITS[name]
        nn.init.xavier_normal_(self.linear.weight)
        # The published unit keeps its bias as a matrix of one row, which is drawn like any other.
        nn.init.xavier_normal_(self.linear.bias.data[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.linear(x).chunk(2, dim=-1)
        return self.activation(left) * right


def _linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def projection(
    in_features: int, hidden: int, out_features: int, rate: float, name: GatedUnitName, zero_bias: bool
) -> nn.Sequential:
    """Dropout, gated hidden layer (none where hidden <= 0), linear layer. zero_bias: False leaves the bias after a
    hidden layer as torch draws it."""
    if hidden <= 0:
        return nn.Sequential(Dropout(rate), _linear(in_features, out_features))
    last = _linear(hidden, out_features)
    if not zero_bias:
        nn.init.uniform_(last.bias, -(hidden**-0.5), hidden**-0.5)
    return nn.Sequential(Dropout(rate), GatedUnit(in_features, hidden, name), last)


class IdentityProjection(nn.Module):
    """The first ``width`` entries of the input as the first component, one linear layer after dropout for the
    others."""

    def __init__(self, in_features: int, groups: int, width: int, rate: float) -> None:
        super().__init__()
        self.width = width
        self.others: nn.Module | None = None
        if groups > 1:
            self.others = nn.Sequential(Dropout(rate), _linear(in_features, (groups - 1) * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[..., : self.width]
        return first if self.others is None else torch.cat([first, self.others(x)], dim=-1)


def two_layers(in_features: int, hidden: int, out_features: int, rate: float, bias: bool) -> nn.Sequential:
    """Dropout, linear layer with silu (none where hidden <= 0), linear layer with or without bias."""
    if hidden <= 0:
        return nn.Sequential(Dropout(rate), _linear(in_features, out_features, bias))
    first = _linear(in_features, hidden)
    return nn.Sequential(Dropout(rate), first, nn.SiLU(), _linear(hidden, out_features, bias))
