"""Training and answering under Lightning's trainer: the optional extra ``lightning``.

`LightningModule` wraps a training task of this program or a model of RePlay's form, `DataModule` and `ParquetModule`
feed it, and callbacks measure it and collect what it recommends.
"""

from importlib.util import find_spec

from generative_recommenders.errors import not_installed

if find_spec("lightning") is None:
    raise not_installed("lightning", "lightning")

from generative_recommenders.lightning.callbacks import (
    ComputeMetricsCallback,
    HiddenStatesCallback,
    PandasTopItemsCallback,
    PolarsTopItemsCallback,
    SparkTopItemsCallback,
    TorchTopItemsCallback,
)
from generative_recommenders.lightning.module import LightningModule
from generative_recommenders.lightning.optimization import (
    BaseLRSchedulerFactory,
    BaseOptimizerFactory,
    LambdaLRSchedulerFactory,
    LRSchedulerFactory,
    OptimizerFactory,
)
from generative_recommenders.lightning.parquet import ParquetModule
from generative_recommenders.lightning.prepared import DataModule

__all__ = [
    "BaseLRSchedulerFactory",
    "BaseOptimizerFactory",
    "ComputeMetricsCallback",
    "DataModule",
    "HiddenStatesCallback",
    "LRSchedulerFactory",
    "LambdaLRSchedulerFactory",
    "LightningModule",
    "OptimizerFactory",
    "PandasTopItemsCallback",
    "ParquetModule",
    "PolarsTopItemsCallback",
    "SparkTopItemsCallback",
    "TorchTopItemsCallback",
]
