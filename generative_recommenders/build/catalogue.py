"""Data-set facts for building models, losses and samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from generative_recommenders.build.entity_features import FeatureReader
from generative_recommenders.data.splits import training_counts
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.two_tower import EntityFeature
from generative_recommenders.modeling.events import EventFeature
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec, ListReduction
from generative_recommenders.modeling.model import SequenceRecommender


@dataclass(frozen=True)
class Catalogue:
    """Sizes, training counts, what columns there are, and readers of features.

    counts: ``[V]`` training events of item id i + 1. rating_range: lowest and highest rating, or None.
    categories: ``[V]`` int64 of the asked category feature, from 0, or None. items, users: read their features when
    asked; None without a data set. event_features: columns that histories can be read with, by name.
    """

    num_items: int
    has_ratings: bool
    has_timestamps: bool
    counts: torch.Tensor
    rating_range: tuple[float, float] | None = None
    categories: torch.Tensor | None = None
    items: FeatureReader | SavedFeatures | None = None
    users: FeatureReader | SavedFeatures | None = None
    event_features: dict[str, EventFeature] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: SequenceDataset, train_stops: np.ndarray, category_feature: str | None = None) -> Catalogue:
        """train_stops: ``[U]``, events that each user trains on. category_feature: of the items, for
        ``categories``. UserError for item ids out of range.
        """
        lowest, highest = int(dataset.items.min()), int(dataset.items.max())
        if lowest < 1 or highest > dataset.num_items:
            raise UserError(
                f"{dataset.folder}: item ids reach from {lowest} to {highest}, outside 1..{dataset.num_items}; "
                "prepare the data again"
            )
        counts = training_counts(dataset.items, dataset.offsets, train_stops, dataset.num_items)
        ratings = dataset.ratings
        items = FeatureReader(dataset, "item", counts > 0)
        categories = None
        if category_feature is not None:
            (feature,) = items.read([category_feature], 1, "train_fn.category_feature")
            if feature.spec.kind != "categorical":
                raise UserError(
                    f"train_fn.category_feature {category_feature!r} is {feature.spec.kind}: "
                    "choose one of one category an item"
                )
            categories = feature.values[1:].long() - 1
        return cls(
            dataset.num_items,
            dataset.ratings is not None,
            dataset.timestamps is not None,
            torch.from_numpy(counts),
            (float(ratings.min()), float(ratings.max())) if ratings is not None and len(ratings) else None,
            categories,
            items,
            FeatureReader(dataset, "user", train_stops > 0),
            _event_features(dataset),
        )

    def features(
        self,
        owner: Literal["item", "user"],
        names: Sequence[str],
        embedding_dim: int,
        asked_by: str,
        list_reduction: ListReduction = "mean",
    ) -> list[EntityFeature]:
        """The named features of items or users, see `FeatureReader.read`; UserError where there is nothing to read
        from."""
        reader = self.items if owner == "item" else self.users
        if reader is None:
            raise UserError(f"{asked_by}: there is no data set to read {', '.join(names)} from")
        return reader.read(names, embedding_dim, asked_by, list_reduction)

    def facts(self, model: SequenceRecommender, dataset: SequenceDataset) -> dict[str, Any]:
        """The data-set facts that a checkpoint keeps, as JSON, so that `of_facts` builds the model again without
        them."""
        read = model.sequence.event_features
        used = {feature.name for feature in read.features} if read is not None else set()
        facts: dict[str, Any] = {
            "has_ratings": self.has_ratings,
            "has_timestamps": self.has_timestamps,
            "rating_range": self.rating_range,
            "event_features": {
                name: asdict(feature) for name, feature in self.event_features.items() if feature.name in used
            },
            "event_columns": [],
        }
        for each in dataset.manifest.event_columns:
            if each.name in used:
                names = dataset.vocabulary(each.name).to_pylist() if each.kind == "categorical" else None
                facts["event_columns"].append({**asdict(each), "categories": names})
        parts: tuple[tuple[str, Any, Any], ...] = (
            ("item", model.items.tower, self.items),
            ("user", model.sequence.context_merger, self.users),
        )
        for owner, part, reader in parts:
            schema = () if part is None else part.embedder.schema
            facts[f"{owner}_features"] = [asdict(spec) for spec in schema]
            # Those that a checkpoint holds are ids and scaled numbers already, with nothing to encode them by.
            known = [spec.name for spec in schema] if isinstance(reader, FeatureReader) else []
            facts[f"{owner}_encodings"] = reader.encodings(known) if known else {}
        return facts

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], num_items: int, tensors: Mapping[str, torch.Tensor]) -> Catalogue:
        """The data as a checkpoint knows them. facts: of `facts`, or empty; tensors: of the checkpoint."""
        rows, bounds = tensors.get("model.items.row_of_item"), facts.get("rating_range")
        return cls(
            num_items,
            bool(facts.get("has_ratings", True)),
            bool(facts.get("has_timestamps", True)),
            torch.ones(num_items, dtype=torch.int64),
            None if bounds is None else (float(bounds[0]), float(bounds[1])),
            None if rows is None else rows[1:] - 1,
            SavedFeatures(facts.get("item_features", ()), tensors, "model.items.features."),
            SavedFeatures(facts.get("user_features", ()), tensors, "model.sequence.context_merger.features."),
            {name: EventFeature(**each) for name, each in facts.get("event_features", {}).items()},
        )


def reads_users(model: SequenceRecommender) -> bool:
    """Whether scores depend on who the user is, beside the history: MoL's user tables, features of users."""
    return bool(len(getattr(model.similarity, "user_tables", ()))) or model.sequence.context_merger is not None


@dataclass(frozen=True)
class SavedFeatures:
    """Features of items or users as a checkpoint holds them. specs: their `EmbeddingSpec`s as JSON."""

    specs: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, torch.Tensor]
    prefix: str

    def read(
        self, names: Sequence[str], embedding_dim: int, asked_by: str, list_reduction: ListReduction = "mean"
    ) -> list[EntityFeature]:
        """The named features, see `FeatureReader.read`."""
        saved = {spec["name"]: (number, spec) for number, spec in enumerate(self.specs)}
        missing = [name for name in names if name not in saved]
        if missing:
            raise UserError(
                f"{asked_by}: the checkpoint does not say what feature {missing[0]!r} is; train on with this release "
                "to have it written"
            )
        return [
            EntityFeature(EmbeddingSpec(**saved[name][1]), self.tensors[f"{self.prefix}feature{saved[name][0]}"])
            for name in names
        ]


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
            features[each.name] = EventFeature(each.name, None, *((each.mean, each.std) if each.kind == "time" else ()))
    return features
