"""Feature columns to embeddings: one module a feature, and `SequenceEmbedding` over all of a schema.

Ids of a categorical feature are 1..C with 0 for padding, and one more row C + 1 for categories that were
never seen. A feature whose padding id is its cardinality (ids 0..C-1) says so with ``padding_index``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from absl import logging
from torch import nn

from generative_recommenders.config.sections import ListReduction
from generative_recommenders.errors import UserError

FeatureKind = Literal["categorical", "categorical_list", "numerical", "numerical_list"]

_KINDS = ("categorical", "categorical_list", "numerical", "numerical_list")


@dataclass(frozen=True)
class EmbeddingSpec:
    """What one feature is, and how it becomes an embedding.

    name: its key in the batch.
    kind: "categorical" ids ``[...]``, "categorical_list" ids ``[..., K]``, "numerical" values ``[...]`` or
        "numerical_list" values ``[..., width]``.
    embedding_dim: width D of its embedding.
    cardinality: categories C, padding and unknown not counted (categorical kinds).
    width: values a numerical list holds.
    padding_index: the id of padding.
    unknown_bucket: whether ids outside 0..C share one more row; without it such an id is an IndexError.
    list_reduction: how the entries of a categorical list become one embedding.
    is_item_id: the feature is the item itself.
    """

    name: str
    kind: FeatureKind
    embedding_dim: int
    cardinality: int = 0
    width: int = 1
    padding_index: int = 0
    unknown_bucket: bool = True
    list_reduction: ListReduction = "sum"
    is_item_id: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UserError(f"feature {self.name!r}: kind {self.kind!r} is none of {', '.join(_KINDS)}")
        if self.list_reduction not in ("sum", "mean", "max"):
            raise UserError(
                f"feature {self.name!r}: list reduction {self.list_reduction!r} is none of sum, mean, max"
            )
        if self.is_categorical and self.cardinality < 1:
            raise UserError(f"feature {self.name!r}: a {self.kind} feature needs a cardinality of at least 1")
        if self.is_categorical and not 0 <= self.padding_index <= self.cardinality:
            raise UserError(
                f"feature {self.name!r}: padding id {self.padding_index} lies outside 0..{self.cardinality}"
            )

    @property
    def is_categorical(self) -> bool:
        return self.kind in ("categorical", "categorical_list")

    @property
    def is_list(self) -> bool:
        return self.kind in ("categorical_list", "numerical_list")


class CategoricalEmbedding(nn.Module):
    """A table of ``cardinality + 1`` rows (one is padding and stays 0), plus the unknown bucket where there
    is one."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        super().__init__()
        self.spec = spec
        rows = spec.cardinality + 1 + spec.unknown_bucket
        if spec.is_list:
            self.emb: nn.Embedding | nn.EmbeddingBag = nn.EmbeddingBag(
                rows, spec.embedding_dim, mode=spec.list_reduction, padding_idx=spec.padding_index
            )
        else:
            self.emb = nn.Embedding(rows, spec.embedding_dim, padding_idx=spec.padding_index)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal rows, padding 0."""
        nn.init.xavier_normal_(self.emb.weight)
        with torch.no_grad():
            self.emb.weight[self.spec.padding_index].zero_()

    @property
    def embedding_dim(self) -> int:
        return self.spec.embedding_dim

    @property
    def weight(self) -> torch.Tensor:
        """``[cardinality, D]``: the rows of the categories in the order of their ids, without padding and
        unknown."""
        table, padding = self.emb.weight[: self.spec.cardinality + 1], self.spec.padding_index
        if padding == 0:
            return table[1:]
        if padding == self.spec.cardinality:
            return table[:-1]
        return torch.cat([table[:padding], table[padding + 1 :]])

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 ``[...]`` to ``[..., D]``; a list's ``[..., K]`` to ``[..., D]``.

        Padding entries of a list do not count, in the mean neither; a list of padding alone gives 0.
        """
        indices = self.known(indices)
        if not self.spec.is_list:
            return self.emb(indices)
        return self.emb(indices.reshape(-1, indices.shape[-1])).unflatten(0, indices.shape[:-1])

    def known(self, indices: torch.Tensor) -> torch.Tensor:
        """The ids with those outside 0..C replaced by the unknown bucket's, where there is one."""
        if not self.spec.unknown_bucket:
            return indices
        return indices.masked_fill(self._unknown(indices), self.spec.cardinality + 1)

    def count_unknown(self, indices: torch.Tensor) -> int:
        """How many ids fall into the unknown bucket."""
        return int(self._unknown(indices).sum())

    def _unknown(self, indices: torch.Tensor) -> torch.Tensor:
        return (indices < 0) | (indices > self.spec.cardinality)


class IdentityEmbedding(nn.Module):
    """Values that already are an embedding: ``[..., D]`` comes out unchanged. ``weight`` is the identity
    ``[D, D]``."""

    weight: torch.Tensor

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.register_buffer("weight", torch.eye(embedding_dim), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


class NumericalEmbedding(nn.Module):
    """A linear layer with bias over a value or a list of values; a list as wide as the embedding passes
    unchanged."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width if spec.is_list else 1
        passes = width == spec.embedding_dim
        self.linear = IdentityEmbedding(width) if passes else nn.Linear(width, spec.embedding_dim)

    @property
    def embedding_dim(self) -> int:
        return self.spec.embedding_dim

    @property
    def weight(self) -> torch.Tensor:
        """``[D, width]``, the identity matrix where nothing is learned."""
        return self.linear.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """float ``[...]`` (one value) or ``[..., width]`` (a list) to ``[..., D]``."""
        return self.linear(values if self.spec.is_list else values.unsqueeze(-1))


class SequenceEmbedding(nn.Module):
    """An embedding module for every feature of a schema, by name.

    schema: the features; their names must differ.
    """

    def __init__(self, schema: Sequence[EmbeddingSpec]) -> None:
        super().__init__()
        names = [spec.name for spec in schema]
        if len(set(names)) != len(names):
            raise UserError(f"features of a schema must have different names, got {', '.join(names)}")
        self.schema = tuple(schema)
        self._keys = {spec.name: _module_key(spec.name, number) for number, spec in enumerate(schema)}
        self._item_feature = next((spec.name for spec in schema if spec.is_item_id), None)
        self.feature_embedders = nn.ModuleDict(
            {self._keys[spec.name]: build_embedding(spec) for spec in schema}
        )

    @property
    def names(self) -> list[str]:
        return list(self._keys)

    @property
    def embeddings_dim(self) -> dict[str, int]:
        """The width of every feature's embedding."""
        return {name: self.embedder(name).embedding_dim for name in self._keys}

    def embedder(self, name: str) -> CategoricalEmbedding | NumericalEmbedding:
        """The module of one feature; UserError for a name that the schema does not have."""
        if name not in self._keys:
            raise UserError(f"feature {name!r} has no embedding: the schema has {', '.join(self._keys)}")
        return self.feature_embedders[self._keys[name]]  # type: ignore[return-value]

    def forward(
        self, feature_tensor: Mapping[str, torch.Tensor], feature_names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Embed the named features (all of the schema unless given): name to ``[..., D]``."""
        names = self.names if feature_names is None else feature_names
        missing = [name for name in names if name not in feature_tensor]
        if missing:
            raise UserError(
                f"features missing from the batch: {', '.join(missing)} (it has {sorted(feature_tensor)})"
            )
        return {name: self.embedder(name)(feature_tensor[name]) for name in names}

    def get_item_weights(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        """The embeddings of items: ``[..., D]`` for ids ``[...]``, or the whole table without its padding
        row."""
        if self._item_feature is None:
            raise UserError("the schema names no item id feature, so there are no item embeddings to read")
        item_embedder = self.embedder(self._item_feature)
        return item_embedder.weight if indices is None else item_embedder(indices)


def build_embedding(spec: EmbeddingSpec) -> CategoricalEmbedding | NumericalEmbedding:
    """The embedding module that a feature's kind asks for."""
    return CategoricalEmbedding(spec) if spec.is_categorical else NumericalEmbedding(spec)


def category_ids(
    values: Iterable[Hashable], vocabulary: Mapping[Hashable, int], feature: str
) -> torch.Tensor:
    """Categories as ids: int64 ``[len(values)]``, 0 for None, C + 1 for values outside the vocabulary.

    vocabulary: value to id in 1..C. One warning in the log counts the unseen values.
    """
    unknown = len(vocabulary) + 1
    ids = torch.tensor([0 if v is None else vocabulary.get(v, unknown) for v in values], dtype=torch.int64)
    unseen = int((ids == unknown).sum())
    if unseen:
        logging.warning("feature %s: %d values were never seen and share the unknown bucket", feature, unseen)
    return ids


_RESERVED_KEYS = frozenset(dir(nn.ModuleDict()))


def _module_key(name: str, number: int) -> str:
    """A key that torch takes: the name itself unless it holds a dot or is an attribute of modules
    ("type")."""
    return f"feature{number}" if not name or "." in name or name in _RESERVED_KEYS else name
