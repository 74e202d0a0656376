"""RePlay's tensor schema, as far as its documented models and readers use it.

Ids start at 0 and the padding id of a feature is usually its cardinality; the rest of this package has ids from 1 and
padding 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from generative_recommenders.errors import UserError

__all__ = [
    "FeatureHint",
    "FeatureSource",
    "FeatureType",
    "TensorFeatureInfo",
    "TensorFeatureSource",
    "TensorSchema",
]
DEFAULT_EMBEDDING_DIM = 64


class FeatureType(Enum):
    CATEGORICAL = "categorical"
    CATEGORICAL_LIST = "categorical_list"
    NUMERICAL = "numerical"
    NUMERICAL_LIST = "numerical_list"


class FeatureHint(Enum):
    ITEM_ID = "item_id"
    QUERY_ID = "query_id"
    RATING = "rating"
    TIMESTAMP = "timestamp"


class FeatureSource(Enum):
    ITEM_FEATURES = "item_features"
    QUERY_FEATURES = "query_features"
    INTERACTIONS = "interactions"


@dataclass(frozen=True)
class TensorFeatureSource:
    """The table and column a feature comes from; ``index``: place of the column where the source has no names."""

    source: FeatureSource
    column: str
    index: int | None = None


@dataclass(frozen=True)
class TensorFeatureInfo:
    """One feature.

    is_seq: one value per event instead of one per user. feature_hint: its role, if it has one. cardinality: categories,
    for categorical types. padding_value: the id (or value) of padding, for item ids the cardinality or the last one
    within it. tensor_dim: values of a numerical list.
    """

    name: str
    feature_type: FeatureType
    is_seq: bool = False
    feature_hint: FeatureHint | None = None
    feature_sources: Sequence[TensorFeatureSource] | None = None
    cardinality: int | None = None
    padding_value: int = 0
    embedding_dim: int = DEFAULT_EMBEDDING_DIM
    tensor_dim: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.feature_type, FeatureType):
            raise UserError(f"feature {self.name!r}: feature_type {self.feature_type!r} is not a FeatureType")
        if self.is_cat and self.tensor_dim is not None:
            raise UserError(f"feature {self.name!r}: tensor_dim belongs to numerical features")
        if self.is_num and self.cardinality is not None:
            raise UserError(f"feature {self.name!r}: cardinality belongs to categorical features")
        if self.embedding_dim is None:  # RePlay's default
            object.__setattr__(self, "embedding_dim", DEFAULT_EMBEDDING_DIM)

    @property
    def feature_source(self) -> TensorFeatureSource | None:
        """The only source, or None; UserError where there are several."""
        if not self.feature_sources:
            return None
        if len(self.feature_sources) > 1:
            raise UserError(f"feature {self.name!r} has {len(self.feature_sources)} sources, expected one")
        return self.feature_sources[0]

    @property
    def is_cat(self) -> bool:
        return self.feature_type in (FeatureType.CATEGORICAL, FeatureType.CATEGORICAL_LIST)

    @property
    def is_num(self) -> bool:
        return not self.is_cat

    @property
    def is_list(self) -> bool:
        return self.feature_type in (FeatureType.CATEGORICAL_LIST, FeatureType.NUMERICAL_LIST)


def _features(wanted: Callable[[TensorFeatureInfo], bool]) -> property:
    """The features that are wanted, as a schema."""
    return property(lambda schema: TensorSchema([each for each in schema.all_features if wanted(each)]))


def _features_with(hint: FeatureHint) -> property:
    return property(lambda schema: schema.filter(feature_hint=hint))


def _name_with(hint: FeatureHint) -> property:
    """The name of the only feature of that hint, None without one; UserError where there are several."""

    def name(schema: TensorSchema) -> str | None:
        found = schema.filter(feature_hint=hint)
        return found.item().name if found else None

    return property(name)


class TensorSchema(dict[str, TensorFeatureInfo]):
    """Features by name, in the order given."""

    def __init__(self, features_list: Sequence[TensorFeatureInfo] | TensorFeatureInfo) -> None:
        features = [features_list] if isinstance(features_list, TensorFeatureInfo) else list(features_list)
        super().__init__({feature.name: feature for feature in features})
        if len(self) != len(features):
            raise UserError(f"features of a schema must differ in name: {[f.name for f in features]}")

    def __add__(self, other: TensorSchema) -> TensorSchema:
        return TensorSchema([*self.all_features, *other.all_features])

    @property
    def all_features(self) -> list[TensorFeatureInfo]:
        return list(self.values())

    @property
    def names(self) -> list[str]:
        return list(self)

    def item(self) -> TensorFeatureInfo:
        """The only feature; UserError where there are more or none."""
        if len(self) != 1:
            raise UserError(f"a schema of one feature was expected, this one has {self.names}")
        return self.all_features[0]

    def subset(self, features_to_keep: Iterable[str]) -> TensorSchema:
        """The named features, in the order named."""
        return TensorSchema([self[name] for name in features_to_keep])

    def filter(
        self,
        name: str | None = None,
        feature_hint: FeatureHint | None = None,
        is_seq: bool | None = None,
        feature_type: FeatureType | None = None,
    ) -> TensorSchema:
        """The features that agree with everything given."""
        wanted = {"name": name, "feature_hint": feature_hint, "is_seq": is_seq, "feature_type": feature_type}
        given = {key: value for key, value in wanted.items() if value is not None}
        return TensorSchema([f for f in self.values() if all(getattr(f, key) == given[key] for key in given)])

    item_id_features = _features_with(FeatureHint.ITEM_ID)
    query_id_features = _features_with(FeatureHint.QUERY_ID)
    timestamp_features = _features_with(FeatureHint.TIMESTAMP)
    rating_features = _features_with(FeatureHint.RATING)
    item_id_feature_name = _name_with(FeatureHint.ITEM_ID)
    query_id_feature_name = _name_with(FeatureHint.QUERY_ID)
    timestamp_feature_name = _name_with(FeatureHint.TIMESTAMP)
    rating_feature_name = _name_with(FeatureHint.RATING)
    sequential_features = _features(lambda feature: feature.is_seq)
    categorical_features = _features(lambda feature: feature.is_cat)
    numerical_features = _features(lambda feature: feature.is_num)


def item_id_feature(schema: TensorSchema, who: str) -> TensorFeatureInfo:
    """The feature of item ids; UserError, in the name of who needs it, where there is none, or several."""
    found = schema.item_id_features
    if len(found) != 1:
        wanted = "one must have feature_hint=FeatureHint.ITEM_ID"
        raise UserError(f"{who}: the schema has {len(found) or 'no'} item id features; {wanted}")
    return found.item()
