"""RePlay's learning rate schedules by their module path."""

from generative_recommenders.lightning.optimization import (
    BaseLRSchedulerFactory,
    LambdaLRSchedulerFactory,
    LRSchedulerFactory,
)

__all__ = ["BaseLRSchedulerFactory", "LRSchedulerFactory", "LambdaLRSchedulerFactory"]
