"""Protocol of normalisations by RePlay's module path."""

from generative_recommenders.compat.replay.nn.protocols import NormalizerProto

__all__ = ["NormalizerProto"]
