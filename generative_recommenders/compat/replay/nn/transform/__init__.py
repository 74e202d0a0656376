"""RePlay's transforms of batches."""

from generative_recommenders.compat.replay.nn.transform.columns import (
    CopyTransform,
    EqualityMaskTransform,
    GroupTransform,
    NextTokenTransform,
    RenameTransform,
    SelectTransform,
    SequenceRollTransform,
    TokenMaskTransform,
    TrimTransform,
    UnsqueezeTransform,
)
from generative_recommenders.compat.replay.nn.transform.negative_sampling import (
    MultiClassNegativeSamplingTransform,
    UniformNegativeSamplingTransform,
)

__all__ = [
    "CopyTransform",
    "EqualityMaskTransform",
    "GroupTransform",
    "MultiClassNegativeSamplingTransform",
    "NextTokenTransform",
    "RenameTransform",
    "SelectTransform",
    "SequenceRollTransform",
    "TokenMaskTransform",
    "TrimTransform",
    "UniformNegativeSamplingTransform",
    "UnsqueezeTransform",
]
