"""RePlay's ``replay.data.nn`` by its module path; `ParquetModule` needs the extra ``lightning`` and is read on first
use."""

from generative_recommenders import lazy_exports
from generative_recommenders.compat.replay.data.schema import (
    TensorFeatureInfo,
    TensorFeatureSource,
    TensorSchema,
)

__all__ = ["ParquetModule", "TensorFeatureInfo", "TensorFeatureSource", "TensorSchema"]
__getattr__ = lazy_exports(__name__, {"parquet": ["ParquetModule"]})
