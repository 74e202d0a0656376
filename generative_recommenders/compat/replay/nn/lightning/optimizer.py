"""RePlay's optimizer factories by their module path."""

from generative_recommenders.lightning.optimization import BaseOptimizerFactory, OptimizerFactory

__all__ = ["BaseOptimizerFactory", "OptimizerFactory"]
