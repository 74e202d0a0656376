"""RePlay's Parquet module by its module path."""

from generative_recommenders.lightning.parquet import ParquetModule

__all__ = ["ParquetModule"]
