"""Exact ranks over the whole catalogue and what is computed from them. Torchmetrics classes are read on first use."""

from .. import lazy_exports
from .baselines import MarkovSuccessor, MostPopular
from .collectives import Collectives
from .evaluator import EvaluationResult, Evaluator
from .list_metrics import ListMetrics, RecommendationMetrics, coverage, popularity_bias
from .metrics import CUTOFFS, RankHistogram
from .ranks import exact_ranks
from .sampled_candidates import NotComparableWarning, sampled_candidate_metrics

__all__ = [
    "CUTOFFS",
    "AvgPrecisionAt",
    "Collectives",
    "DCGAt",
    "EvaluationResult",
    "Evaluator",
    "ListMetrics",
    "MarkovSuccessor",
    "MeanRecipricolRankAt",
    "MeanReciprocalRankAt",
    "MostPopular",
    "NDCGAt",
    "NotComparableWarning",
    "PrecisionAt",
    "RankHistogram",
    "RankingMetric",
    "RecallAt",
    "RecommendationMetrics",
    "coverage",
    "exact_ranks",
    "popularity_bias",
    "sampled_candidate_metrics",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "torchmetrics_ranking": [
            "AvgPrecisionAt",
            "DCGAt",
            "MeanRecipricolRankAt",
            "MeanReciprocalRankAt",
            "NDCGAt",
            "PrecisionAt",
            "RankingMetric",
            "RecallAt",
        ]
    },
)
