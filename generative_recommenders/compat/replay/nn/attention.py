"""RePlay's differential attention by its module path."""

from generative_recommenders.compat.replay.nn.sequential.diff_transformer import (
    MultiHeadDifferentialAttention,
)

__all__ = ["MultiHeadDifferentialAttention"]
