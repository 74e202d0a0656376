"""Batches of RePlay's form: names to tensors or to groups of tensors, read with a clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from generative_recommenders.errors import UserError

TensorBatch = Mapping[str, Any]
"""Names to tensors, or to groups (mappings of names to tensors)."""


def require(batch: TensorBatch, name: str, who: str) -> Any:
    """``batch[name]``; a missing name is a ``UserError`` that lists the columns present."""
    if name not in batch:
        known = ", ".join(map(str, batch)) or "none"
        raise UserError(f"{who}: the batch has no column '{name}'; its columns: {known}")
    return batch[name]


def require_tensor(batch: TensorBatch, name: str, who: str) -> Tensor:
    """``batch[name]``; a missing name, a group or anything else that is no tensor is a ``UserError``."""
    value = require(batch, name, who)
    if not isinstance(value, Tensor):
        what = "a group of columns" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UserError(f"{who}: '{name}' must be a tensor, not {what}")
    return value
