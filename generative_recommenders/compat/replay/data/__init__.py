"""RePlay's ``replay.data`` by its module path."""

from generative_recommenders.compat.replay.data.schema import FeatureHint, FeatureSource, FeatureType

__all__ = ["FeatureHint", "FeatureSource", "FeatureType"]
