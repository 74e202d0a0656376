"""Observation of attention weights while a model computes, for pictures of what it attends to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from generative_recommenders.ops import dispatch

_open: list[list[torch.Tensor]] = []
"""One list for each `observed_weights` that is open."""


@contextlib.contextmanager
def observed_weights() -> Iterator[list[torch.Tensor]]:
    """Collects the weights of every attention that is computed within, in their order, ``[H, T, T]`` each.

    Of one history with a jagged layout: T are its tokens, row i what token i attends to. Plain references compute them, as fast
    operations keep no such matrix.
    """
    collected: list[torch.Tensor] = []
    _open.append(collected)
    try:
        with dispatch.references():
            yield collected
    finally:
        _open.pop()


def observe(weights: torch.Tensor) -> None:
    """Shows weights ``[H, T, T]`` to whoever observes."""
    for collected in _open:
        collected.append(weights.detach().float().cpu())
