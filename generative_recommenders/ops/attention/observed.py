"""Observation of attention weights while a model computes, for pictures of what it attends to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from generative_recommenders.ops import dispatch


class Observed(NamedTuple):
    """Weights ``[H, T, T]`` of one history with a jagged layout: T are its tokens, row i is what token i attends to.

    by: what they go by, where an attention is one of several side by side and H is 1 for all heads.
    """

    weights: torch.Tensor
    by: str


_open: list[list[Observed]] = []
"""One list for each `observed_weights` that is open."""


@contextlib.contextmanager
def observed_weights() -> Iterator[list[Observed]]:
    """Collects the weights of every attention that is computed within, in their order.

    Plain references compute them, as fast operations keep no such matrix.
    """
    collected: list[Observed] = []
    _open.append(collected)
    try:
        with dispatch.references():
            yield collected
    finally:
        _open.pop()


def observe(weights: torch.Tensor, by: str = "") -> None:
    """Shows weights ``[H, T, T]`` to the observer; by: see `Observed`."""
    for collected in _open:
        # A copy: weights may be a part of a matrix that a view would keep.
        collected.append(Observed(weights.detach().to("cpu", torch.float32, copy=True), by))
