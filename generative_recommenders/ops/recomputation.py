"""Activation checkpointing (arXiv 1604.06174): activations computed again in the backward pass instead of kept."""

from __future__ import annotations

import torch
import torch.utils.checkpoint


def run_block(block: torch.nn.Module, checkpoint: bool, *inputs):
    """The block's output; with checkpoint, its activations are computed again in the backward pass."""
    if not checkpoint:
        return block(*inputs)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
