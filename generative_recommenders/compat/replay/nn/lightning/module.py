"""RePlay's Lightning module by its module path."""

from generative_recommenders.lightning.module import LightningModule

__all__ = ["LightningModule"]
