"""Ranks of single users' targets, of all processes."""

from __future__ import annotations

import torch

from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset

Ranks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Users, targets and ranks, ``[n]`` int64 on the CPU: internal ids from 1, by user; a rank above V is a miss."""


def user_ranks(dataset: SequenceDataset, split: Split, ranks: torch.Tensor) -> Ranks:
    """Of an evaluation of test targets. ranks: ``[U]``, see `EvaluationResult`."""
    users = ranks.numpy().nonzero()[0]
    targets = dataset.items[dataset.offsets[users] + split.test_targets[users]]
    return torch.from_numpy(users + 1), torch.from_numpy(targets.astype("int64")), ranks[users]
