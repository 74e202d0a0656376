"""RePlay's feed-forward networks, which are the program's own."""

from generative_recommenders.ops.feed_forward import PointWiseFeedForward, SwiGLU, SwiGLUEncoder

__all__ = ["PointWiseFeedForward", "SwiGLU", "SwiGLUEncoder"]
