"""Transformers4Rec's ranking metrics by their documented names: the package's own torchmetrics classes."""

from generative_recommenders.evaluation.torchmetrics_ranking import (
    AvgPrecisionAt,
    DCGAt,
    MeanRecipricolRankAt,
    MeanReciprocalRankAt,
    NDCGAt,
    PrecisionAt,
    RankingMetric,
    RecallAt,
)

__all__ = [
    "AvgPrecisionAt",
    "DCGAt",
    "MeanRecipricolRankAt",
    "MeanReciprocalRankAt",
    "NDCGAt",
    "PrecisionAt",
    "RankingMetric",
    "RecallAt",
]
