"""Models with random weights, for times that do not depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import records  # noqa: F401  (the package's place)
import torch

from generative_recommenders.build.parts import Catalogue, build_model
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.retrieval.recommender import Recommender


def recommender(num_items: int, bindings: Mapping[str, Any]) -> Recommender:
    """Of items "0", "1", ... bindings: settings by their gin names."""
    settings = RunSettings().bind(bindings)
    model = build_model(settings, Catalogue(num_items, False, False, torch.ones(num_items, dtype=torch.int64)))
    return Recommender(settings, model, pa.array([str(number) for number in range(num_items)]))
