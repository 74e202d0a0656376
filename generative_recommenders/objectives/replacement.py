"""Fakes of replaced-token detection (ELECTRA, arXiv 2003.10555, section 2): samples of a generator's softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def replace_items(item_ids: Tensor, replaced: Tensor, fakes: Tensor) -> tuple[Tensor, Tensor]:
    """Puts ``fakes [P]`` at the True places of ``replaced [B, N]``, in row-major order.

    Returns (ids ``[B, N]``, labels ``[B, N]`` bool): True where the item is no longer the original one. A
    fake that happens to be the true item counts as original.
    """
    corrupted = item_ids.masked_scatter(replaced, fakes)
    return corrupted, corrupted != item_ids


def gumbel_like(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape of ``logits``, float32: -ln of an exponential draw."""
    device = logits.device if generator is None else generator.device
    draws = torch.empty(logits.shape, dtype=torch.float32, device=device).exponential_(generator=generator)
    return -draws.clamp(min=torch.finfo(draws.dtype).tiny).log().to(logits.device)


def sample_from_softmax(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index per row of ``logits [P, V]``, distributed as their softmax (Gumbel-max), ``[P]`` int64."""
    return (logits + gumbel_like(logits, generator)).argmax(-1)


@torch.no_grad()
def sample_from_catalogue(
    hidden: Tensor, item_weight: Tensor, generator: torch.Generator | None = None, block_size: int = 65536
) -> Tensor:
    """One item id (1..V) per row, distributed as softmax(hidden . item); at most ``[P, block_size]`` is held.

    hidden: ``[P, D]``; item_weight: ``[V, D]``, row i is item id i + 1. The maximum of logits plus Gumbel
    noise is kept while walking over blocks of the catalogue.
    """
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    items = torch.ones(len(hidden), dtype=torch.long, device=hidden.device)
    for start in range(0, len(item_weight), block_size):
        logits = hidden @ item_weight[start : start + block_size].T
        score, index = (logits + gumbel_like(logits, generator)).max(-1)
        items = torch.where(score > best, index + start + 1, items)
        best = torch.maximum(best, score)
    return items
