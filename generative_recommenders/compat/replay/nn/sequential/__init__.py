"""RePlay's sequential models and the blocks that their bodies are assembled from."""

from generative_recommenders.compat.replay.nn.agg import PositionAwareAggregator
from generative_recommenders.compat.replay.nn.sequential.layers import (
    DiffTransformerBlock,
    DiffTransformerLayer,
    SasRecTransformerLayer,
)
from generative_recommenders.compat.replay.nn.sequential.sasrec import (
    NextItemModel,
    QueryTower,
    SasRec,
    SasRecBody,
)
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
