"""Encoders of a layout's tokens, and the item tower that scores by item features."""

from .diff_transformer import DiffTransformer
from .hstu import HSTU
from .sasrec import SASRec
from .transformer import Transformer
from .two_tower import EntityFeature, FeatureMerger, ItemTower, ItemTowerEmbedding

__all__ = [
    "HSTU",
    "DiffTransformer",
    "EntityFeature",
    "FeatureMerger",
    "ItemTower",
    "ItemTowerEmbedding",
    "SASRec",
    "Transformer",
]
