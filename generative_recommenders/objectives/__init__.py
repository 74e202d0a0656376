"""What is predicted, against what, and at what cost: objectives, samplers of negatives, losses."""

from .catalogue_losses import BCE, CATALOGUE_LOSSES, CE, CatalogueLoss, CEWeighted, LogInCE, LogOutCE
from .criterion import CatalogueCriterion, Criterion, SampledCriterion
from .losses import (
    SAMPLED_LOSSES,
    BCELoss,
    BCELossWithRatings,
    BCESampled,
    CESampled,
    GBCELoss,
    LogInCESampled,
    LogOutCESampled,
    LossOutput,
    SampledLoss,
    SampledSoftmaxLoss,
)
from .masking import MaskedItemMasking, MaskedSequence, MaskEmbedding, MaskingScheme
from .negative_samplers import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
    MixedNegativesSampler,
    MultiClassNegativesSampler,
    Negatives,
    NegativesSampler,
    PopularityNegativesSampler,
)
from .permutation import PermutationMasking
from .replaced_detection import ReplacedDetectionCriterion
from .scalable_cross_entropy import ScalableCrossEntropyLoss, SCEParams
from .scoring import LearnedScorer, ProductScorer, SampledScores, Scorer
from .training_examples import CausalObjective, MaskedObjective, TrainingExample

__all__ = [
    "BCE",
    "CATALOGUE_LOSSES",
    "CE",
    "SAMPLED_LOSSES",
    "BCELoss",
    "BCELossWithRatings",
    "BCESampled",
    "CESampled",
    "CEWeighted",
    "CatalogueCriterion",
    "CatalogueLoss",
    "CausalObjective",
    "Criterion",
    "GBCELoss",
    "InBatchNegativesSampler",
    "LearnedScorer",
    "LocalNegativesSampler",
    "LogInCE",
    "LogInCESampled",
    "LogOutCE",
    "LogOutCESampled",
    "LossOutput",
    "MaskEmbedding",
    "MaskedItemMasking",
    "MaskedObjective",
    "MaskedSequence",
    "MaskingScheme",
    "MixedNegativesSampler",
    "MultiClassNegativesSampler",
    "Negatives",
    "NegativesSampler",
    "PermutationMasking",
    "PopularityNegativesSampler",
    "ProductScorer",
    "ReplacedDetectionCriterion",
    "SCEParams",
    "SampledCriterion",
    "SampledLoss",
    "SampledScores",
    "SampledSoftmaxLoss",
    "ScalableCrossEntropyLoss",
    "Scorer",
    "TrainingExample",
]
