"""RePlay's sequential models and the blocks that their bodies are assembled from."""

from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator
from generative_recommenders.compat.replay.nn.sequential.diff_transformer import (
    DiffTransformerBlock,
    DiffTransformerLayer,
)
from generative_recommenders.compat.replay.nn.sequential.next_item import NextItemModel, QueryTower
from generative_recommenders.compat.replay.nn.sequential.sasrec import SasRec, SasRecBody
from generative_recommenders.compat.replay.nn.sequential.sasrec_layer import SasRecTransformerLayer
from generative_recommenders.compat.replay.nn.sequential.twotower import ItemTower, TwoTower, TwoTowerBody

__all__ = [
    "DiffTransformerBlock",
    "DiffTransformerLayer",
    "ItemTower",
    "NextItemModel",
    "PositionAwareAggregator",
    "QueryTower",
    "SasRec",
    "SasRecBody",
    "SasRecTransformerLayer",
    "TwoTower",
    "TwoTowerBody",
]
