"""Scores of items by queries."""

from .dot_product import DotProductSimilarity
from .interface import AuxiliaryLosses, Similarity
from .mixture_of_logits import ItemComponents, MoLSimilarity, QueryComponents
from .mol_settings import MoLSettings

__all__ = [
    "AuxiliaryLosses",
    "DotProductSimilarity",
    "ItemComponents",
    "MoLSettings",
    "MoLSimilarity",
    "QueryComponents",
    "Similarity",
]
