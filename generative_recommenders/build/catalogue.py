"""What models, losses and samplers need to know of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from generative_recommenders.build.entity_features import FeatureReader
from generative_recommenders.data.splits import training_events
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.event_features import EventFeature


@dataclass(frozen=True)
class Catalogue:
    """Sizes, training counts, what columns there are, and readers of features.

    counts: ``[V]`` training events of item id i + 1. rating_range: lowest and highest rating, or None.
    categories: ``[V]`` int64 of the asked category feature, from 0, or None. items, users: read their features when
    asked; None where there is no data set behind. event_features: columns that histories can be read with, by name.
    """

    num_items: int
    has_ratings: bool
    has_timestamps: bool
    counts: torch.Tensor
    rating_range: tuple[float, float] | None = None
    categories: torch.Tensor | None = None
    items: FeatureReader | None = None
    users: FeatureReader | None = None
    event_features: dict[str, EventFeature] = field(default_factory=dict)

    @classmethod
    def of(
        cls, dataset: SequenceDataset, train_stops: np.ndarray, category_feature: str | None = None
    ) -> Catalogue:
        """train_stops: ``[U]``, events that each user trains on. category_feature: of the items, for
        ``categories``. UserError for item ids out of range.
        """
        _check_ids(dataset)
        events = training_events(dataset.offsets, train_stops)
        counts = np.bincount(dataset.items[events], minlength=dataset.num_items + 1)[1:]
        items = FeatureReader(dataset, "item", counts > 0)
        categories = None
        if category_feature is not None:
            (feature,) = items.read([category_feature], 1, "train_fn.category_feature")
            if feature.spec.kind != "categorical":
                raise UserError(
                    f"train_fn.category_feature {category_feature!r} is {feature.spec.kind}: choose one of one category an item"
                )
            categories = feature.values[1:].long() - 1
        return cls(
            dataset.num_items,
            dataset.ratings is not None,
            dataset.timestamps is not None,
            torch.from_numpy(counts),
            _range(dataset.ratings),
            categories,
            items,
            FeatureReader(dataset, "user", train_stops > 0),
            _event_features(dataset),
        )


def _event_features(dataset: SequenceDataset) -> dict[str, EventFeature]:
    """UserError for ids of categories out of range."""
    features = {}
    for name, values in (("rating", dataset.ratings), ("timestamp", dataset.timestamps)):
        if values is not None:
            column = f"{name}s"
            features[name] = EventFeature(
                column, None, float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)) or 1.0
            )
    for each in dataset.manifest.event_columns:
        if each.kind == "categorical":
            ids = dataset.extra[each.name]
            if ids.min() < 0 or ids.max() > each.cardinality:
                raise UserError(
                    f"{dataset.folder}: ids of {each.name} outside 0..{each.cardinality}; prepare the data again"
                )
            features[each.name] = EventFeature(each.name, each.cardinality)
        else:  # numbers come standardised
            features[each.name] = EventFeature(
                each.name, None, *((each.mean, each.std) if each.kind == "time" else ())
            )
    return features


def _range(ratings: np.ndarray | None) -> tuple[float, float] | None:
    return None if ratings is None or not len(ratings) else (float(ratings.min()), float(ratings.max()))


def _check_ids(dataset: SequenceDataset) -> None:
    lowest, highest = int(dataset.items.min()), int(dataset.items.max())
    if lowest < 1 or highest > dataset.num_items:
        raise UserError(
            f"{dataset.folder}: item ids reach from {lowest} to {highest}, outside 1..{dataset.num_items}; "
            "prepare the data again"
        )
