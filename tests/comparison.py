"""Fast operations beside their references: values and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from generative_recommenders.ops import dispatch


def assert_same(
    actual: torch.Tensor, expected: torch.Tensor, leaves: Sequence[torch.Tensor], **tolerance: float
) -> None:
    """Values are close, and so are the gradients of the leaves for one random gradient of the values."""
    torch.testing.assert_close(actual, expected, **tolerance)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(each, leaves, upstream, retain_graph=True) for each in (actual, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


def fast_and_reference(work: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What some work gives by fast operations and by their references, with dropout from one seed."""
    outputs = []
    for context in (contextlib.nullcontext(), dispatch.references()):
        torch.manual_seed(7)
        with context:
            outputs.append(work())
    return outputs
