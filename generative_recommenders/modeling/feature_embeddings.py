"""Feature columns to embeddings: one module a feature, and `SequenceEmbedding` over all of a schema.

Ids of a categorical feature are 1..C with 0 for padding, and one more row C + 1 for categories that were never seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from absl import logging
from torch import nn

from generative_recommenders.config.sections import FeatureKind, ListReduction
from generative_recommenders.errors import UserError

_RESERVED_KEYS = frozenset(dir(nn.ModuleDict()))


@dataclass(frozen=True)
class EmbeddingSpec:
    """What one feature is, and how it becomes an embedding.

    name: its key in the batch.
    kind: "categorical" ids ``[...]``, "categorical_list" ids ``[..., K]`` or "numerical" values ``[...]``.
    embedding_dim: width D of its embedding.
    cardinality: categories C, padding and unknown not counted (categorical kinds).
    list_reduction: how the entries of a categorical list become one embedding.
    """

    name: str
    kind: FeatureKind
    embedding_dim: int
    cardinality: int = 0
    list_reduction: ListReduction = "sum"

    def __post_init__(self) -> None:
        if self.kind not in get_args(FeatureKind):
            known = ", ".join(get_args(FeatureKind))
            raise UserError(f"feature {self.name!r}: kind {self.kind!r} is none of {known}")
        if self.is_categorical and self.cardinality < 1:
            raise UserError(f"feature {self.name!r}: a {self.kind} feature needs a cardinality of at least 1")

    @property
    def is_categorical(self) -> bool:
        return self.kind in ("categorical", "categorical_list")


class EmbeddingRows(nn.Module):
    """A table of which one row is padding and stays 0; lists are reduced without their padding.

    list_reduction: "sum", "mean" or "max" for lists of ids, None for single ones.
    """

    def __init__(self, rows: int, embedding_dim: int, padding_index: int, list_reduction: ListReduction | None) -> None:
        super().__init__()
        if list_reduction not in (None, *(known := get_args(ListReduction))):
            raise UserError(f"list reduction {list_reduction!r} is none of {', '.join(known)}")
        self.list_reduction = list_reduction
        if list_reduction is None:
            self.emb: nn.Embedding | nn.EmbeddingBag = nn.Embedding(rows, embedding_dim, padding_index)
        else:
            self.emb = nn.EmbeddingBag(rows, embedding_dim, mode=list_reduction, padding_idx=padding_index)
        nn.init.xavier_normal_(self.emb.weight)
        with torch.no_grad():
            self.emb.weight[padding_index].zero_()

    @property
    def embedding_dim(self) -> int:
        return self.emb.embedding_dim

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 ``[...]`` to ``[..., D]``; a list's ``[..., K]`` to ``[..., D]``, 0 for a list of padding alone."""
        if self.list_reduction is None:
            return self.emb(indices)
        return self.emb(indices.reshape(-1, indices.shape[-1])).unflatten(0, indices.shape[:-1])


class CategoricalEmbedding(EmbeddingRows):
    """Rows of padding, of C categories and of those never seen: ids outside 0..C share the last one."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        reduction = spec.list_reduction if spec.kind == "categorical_list" else None
        super().__init__(spec.cardinality + 2, spec.embedding_dim, 0, reduction)
        self.cardinality = spec.cardinality

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        unseen = (indices < 0) | (indices > self.cardinality)
        return super().forward(indices.masked_fill(unseen, self.cardinality + 1))


class NumericalEmbedding(nn.Module):
    """A linear layer with bias over a number; an embedding of width 1 is the number itself."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.linear = nn.Identity() if embedding_dim == 1 else nn.Linear(1, embedding_dim)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """float ``[...]`` to ``[..., D]``."""
        return self.linear(values.unsqueeze(-1))


class NamedEmbeddings(nn.Module):
    """Embedding modules by the names of their features."""

    def __init__(self, embedders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # torch takes no name with a dot or of an attribute of modules ("type") for a key.
        self._keys = {
            name: f"feature{number}" if not name or "." in name or name in _RESERVED_KEYS else name
            for number, name in enumerate(embedders)
        }
        if len({*self._keys.values()}) < len(self._keys):
            raise UserError(f"features {', '.join(self._keys)}: rename those called feature0, feature1 and so on")
        self.feature_embedders = nn.ModuleDict({self._keys[name]: each for name, each in embedders.items()})

    def embedder(self, name: str) -> nn.Module:
        """The module of one feature; UserError for a name that has none."""
        if name not in self._keys:
            raise UserError(f"feature {name!r} has no embedding: the schema has {', '.join(self._keys)}")
        return self.feature_embedders[self._keys[name]]

    def forward(
        self, feature_tensor: Mapping[str, torch.Tensor], feature_names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """The named features (all unless given) as embeddings: name to ``[..., D]``."""
        names = list(self._keys) if feature_names is None else feature_names
        missing = [name for name in names if name not in feature_tensor]
        if missing:
            raise UserError(f"features missing from the batch: {', '.join(missing)} (it has {sorted(feature_tensor)})")
        return {name: self.embedder(name)(feature_tensor[name]) for name in names}


class SequenceEmbedding(NamedEmbeddings):
    """An embedding module for every feature of a schema, whose names must differ."""

    def __init__(self, schema: Sequence[EmbeddingSpec]) -> None:
        names = [spec.name for spec in schema]
        if len(set(names)) != len(names):
            raise UserError(f"features of a schema must have different names, got {', '.join(names)}")
        super().__init__(
            {
                spec.name: CategoricalEmbedding(spec) if spec.is_categorical else NumericalEmbedding(spec.embedding_dim)
                for spec in schema
            }
        )
        self.schema = tuple(schema)


def category_ids(values: Iterable[Hashable], vocabulary: Mapping[Hashable, int], feature: str) -> torch.Tensor:
    """Categories as ids: int64 ``[len(values)]``, 0 for None, C + 1 for values outside the vocabulary.

    vocabulary: value to id in 1..C. One warning in the log counts the unseen values.
    """
    unknown = len(vocabulary) + 1
    ids = torch.tensor([0 if v is None else vocabulary.get(v, unknown) for v in values], dtype=torch.int64)
    unseen = int((ids == unknown).sum())
    if unseen:
        logging.warning("feature %s: %d values were never seen and share the unknown bucket", feature, unseen)
    return ids
