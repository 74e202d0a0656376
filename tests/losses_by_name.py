"""The losses that hold the common contract, by every name that they are registered by."""

from __future__ import annotations

from typing import Any

from generative_recommenders.config.registry import LOSSES
from generative_recommenders.objectives.losses.catalogue import CatalogueLoss
from generative_recommenders.objectives.losses.sampled import SampledLoss
from tiny_models import contracted


def _kinds_of(base: type) -> dict[str, Any]:
    makes = {name: LOSSES[name].make for name in contracted(LOSSES)}
    return {name: make for name, make in makes.items() if issubclass(make, base)}


CATALOGUE_LOSSES, SAMPLED_LOSSES = _kinds_of(CatalogueLoss), _kinds_of(SampledLoss)
