"""RePlay's losses under their documented names, arguments and defaults; conventions in `catalogue`."""

from generative_recommenders.compat.replay.nn.loss.catalogue import BCE, CE, CEWeighted, LogInCE, LogOutCE
from generative_recommenders.compat.replay.nn.loss.sampled import (
    BCESampled,
    CESampled,
    LogInCESampled,
    LogOutCESampled,
)
from generative_recommenders.compat.replay.nn.protocols import LossProto

__all__ = [
    "BCE",
    "CE",
    "BCESampled",
    "CESampled",
    "CEWeighted",
    "LogInCE",
    "LogInCESampled",
    "LogOutCE",
    "LogOutCESampled",
    "LossProto",
]
