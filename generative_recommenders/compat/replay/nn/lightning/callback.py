"""RePlay's callbacks by their module path."""

from generative_recommenders.lightning.callbacks import (
    ComputeMetricsCallback,
    HiddenStatesCallback,
    PandasTopItemsCallback,
    PolarsTopItemsCallback,
    SparkTopItemsCallback,
    TorchTopItemsCallback,
)

__all__ = [
    "ComputeMetricsCallback",
    "HiddenStatesCallback",
    "PandasTopItemsCallback",
    "PolarsTopItemsCallback",
    "SparkTopItemsCallback",
    "TorchTopItemsCallback",
]
