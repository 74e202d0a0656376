"""Event columns as a part of the encoder's input: categories are embedded, numbers and times are projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from generative_recommenders.modeling.initialization import truncated_normal_
from generative_recommenders.modeling.items import lookup_rows


@dataclass(frozen=True)
class EventFeature:
    """name: key of the event column. num_categories: C, ids 1..C, 0 for none; None for numbers, of this mean and std."""

    name: str
    num_categories: int | None = None
    mean: float = 0.0
    std: float = 1.0


class EventFeatures(torch.nn.Module):
    """Sum over the features of an embedding ``[C + 1, D]``, or of the standardised number times a vector ``[D]``.

    The fill, 0, has an embedding of its own among categories and adds nothing where it stands for a number.
    """

    def __init__(self, features: Sequence[EventFeature], embedding_dim: int) -> None:
        super().__init__()
        self.features = tuple(features)
        self.weights = (
            torch.nn.ParameterDict()
        )  # keys begin with of_: a bare name may be a method of modules, as "half"
        for feature in self.features:
            shape = (
                (embedding_dim,)
                if feature.num_categories is None
                else (feature.num_categories + 1, embedding_dim)
            )
            self.weights[f"of_{feature.name}"] = torch.nn.Parameter(
                truncated_normal_(torch.empty(shape), std=0.02)
            )

    def forward(self, items: torch.Tensor, events: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``items [T, D]`` with the features of their events (``[T]`` columns) added."""
        for feature in self.features:
            values, weight = events[feature.name], self.weights[f"of_{feature.name}"]
            if feature.num_categories is not None:
                items = items + lookup_rows(weight, values)
            else:
                # times exceed what float32 resolves, differences from their mean do not
                numbers = ((values.double() - feature.mean) / feature.std).float()
                items = items + numbers.where(values != 0, 0.0)[:, None] * weight
        return items
