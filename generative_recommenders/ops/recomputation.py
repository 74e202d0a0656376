"""Activation checkpointing (arXiv 1604.06174): activations computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from generative_recommenders.ops import numbered_rows

T = TypeVar("T")


def run_block(block: torch.nn.Module, checkpoint: bool, *inputs):
    """The block's output; with checkpoint, its activations are computed again in the backward pass."""
    if not checkpoint:
        return block(*inputs)
    return recomputed(block, *inputs)


def recomputed(function: Callable[..., T], *inputs: Any) -> T:
    """Results of the function, computed again in the backward pass under the same dropout masks."""
    return torch.utils.checkpoint.checkpoint(
        function, *inputs, use_reentrant=False, context_fn=numbered_rows.recomputed
    )
