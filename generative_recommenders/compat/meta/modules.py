"""Names of the HSTU authors' public program for what it is called otherwise here."""

from __future__ import annotations

import torch

from generative_recommenders.modeling.similarity.interface import Similarity as GeneralizedInteractionModule

__all__ = ["GeneralizedInteractionModule", "truncated_normal"]


@torch.no_grad()
def truncated_normal(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Fills x with Normal(mean, std²), truncated to two standard deviations around the mean; returns it."""
    if std == 0:  # torch divides by it
        return x.fill_(mean)
    return torch.nn.init.trunc_normal_(x, mean, std, mean - 2.0 * std, mean + 2.0 * std)
