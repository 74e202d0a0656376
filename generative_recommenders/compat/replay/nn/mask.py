"""Dense attention masks, for RePlay's building blocks; the program's own encoders describe a mask by two integers per
token (`layout.AttentionMask`).

A mask here is additive: 0 where a query may look, a very negative number where it may not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from generative_recommenders.compat.replay.nn.protocols import AttentionMaskProto
from generative_recommenders.errors import UserError
from generative_recommenders.ops import dispatch

__all__ = [
    "AttentionMaskProto",
    "DefaultAttentionMask",
    "additive_mask",
    "causal_mask",
    "hide_padded_keys",
    "mask_for",
    "mask_per_head",
]


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """bool ``[length, length]``, True where the key (column) is not later than the query (row)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def additive_mask(allowed: Tensor, closed: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bool mask (True = may look) as 0 and ``closed``; ``closed`` is the dtype's minimum unless given.

    With the minimum instead of -inf a query that may look nowhere averages over all keys and stays finite.
    """
    closed = torch.finfo(dtype).min if closed is None else closed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, closed)


def mask_per_head(attention_mask: Tensor, batch_size: int, num_heads: int) -> Tensor:
    """``[B * H, N, N]`` (index b * H + h) or ``[B, H, N, N]`` as ``[B, H, N, N]``; UserError for any other shape."""
    if attention_mask.shape[:-2] not in ((batch_size * num_heads,), (batch_size, num_heads)):
        raise UserError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: expected "
            f"[{batch_size * num_heads}, N, N] or [{batch_size}, {num_heads}, N, N]"
        )
    return attention_mask.reshape(batch_size, num_heads, *attention_mask.shape[-2:])


def hide_padded_keys(attention_mask: Tensor, padding_mask: Tensor) -> Tensor:
    """Add the dtype's minimum to the columns of padded keys.

    attention_mask: additive ``[B, H, N, N]``; padding_mask: bool ``[B, N]``, True = real event. With the minimum, not
    -inf, a padded query that may look at itself alone keeps a finite row.
    """
    return attention_mask + additive_mask(padding_mask, dtype=attention_mask.dtype)[:, None, None, :]


def mask_for(x: Tensor, attention_mask: Tensor) -> Tensor:
    """The mask in the dtype that attention over ``x`` computes in (autocast's, where it is on).

    In a dtype of smaller range -inf and float32's minimum both become that dtype's minimum: a row that is closed
    altogether stays finite in every kernel.
    """
    dtype = dispatch.computed_dtype(x)
    lowest = torch.finfo(dtype).min
    if lowest > torch.finfo(attention_mask.dtype).min:
        attention_mask = attention_mask.clamp(min=lowest)
    return attention_mask.to(dtype)


class DefaultAttentionMask(nn.Module):
    """Causal mask over real keys, with an open diagonal so that padded queries see themselves.

    Closed cells hold -inf in training mode and the float32 minimum in evaluation mode.

    reference_feature_name: the feature whose second dimension is the sequence length.
    num_heads: each row's mask is repeated for as many heads.
    """

    def __init__(self, reference_feature_name: str, num_heads: int) -> None:
        super().__init__()
        self.reference_feature_name = reference_feature_name
        self.num_heads = num_heads

    def forward(self, feature_tensor: Mapping[str, Tensor], padding_mask: Tensor) -> Tensor:
        """feature_tensor: name to ``[B, N, ...]``; padding_mask: bool ``[B, N]``, True = real.

        Returns float32 ``[B * H, N, N]``, index b * H + h. UserError where the reference feature is missing.
        """
        if self.reference_feature_name not in feature_tensor:
            raise UserError(
                f"feature {self.reference_feature_name!r} is not in the batch ({sorted(feature_tensor)}): "
                "DefaultAttentionMask reads the sequence length from it"
            )
        length = feature_tensor[self.reference_feature_name].shape[1]
        device = padding_mask.device
        diagonal = torch.eye(length, dtype=torch.bool, device=device)
        allowed = (causal_mask(length, device) & padding_mask[:, None, :].bool()) | diagonal
        mask = additive_mask(allowed, closed=float("-inf") if self.training else None)
        return mask.repeat_interleave(self.num_heads, dim=0)
