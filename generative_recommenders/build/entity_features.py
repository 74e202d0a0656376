"""Feature columns of a prepared data set as tensors: what item towers, context mergers and samplers by class
read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from absl import logging

from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.two_tower import EntityFeature
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec, ListReduction, category_ids

KINDS = ("categorical", "categorical_list", "numerical")


@dataclass(frozen=True)
class FeatureReader:
    """Reads features of all items or all users, when asked.

    owner: "item" or "user". seen: ``[n]`` bool, which of them occur in training: categories and scales come
    from those.
    """

    dataset: SequenceDataset
    owner: str
    seen: np.ndarray

    def read(
        self, names: Sequence[str], embedding_dim: int, asked_by: str, list_reduction: ListReduction = "mean"
    ) -> list[EntityFeature]:
        """The named features; asked_by: the gin name that holds them, for errors.

        Categories that no training item has, and missing values, share the unknown bucket; a missing number
        is the mean. Both are counted in a warning. UserError for a name that is no feature.
        """
        return [self._read(name, embedding_dim, asked_by, list_reduction) for name in names]

    def encodings(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """How values become what `read` gives, as JSON: categories in the order of their ids, or mean and deviation."""
        kinds = {spec.name: spec.kind for spec in self.dataset.feature_specs(self.owner)}
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            column = self._table().column(name).combine_chunks()
            if kinds[name] == "numerical":
                mean, std = self._scale(name, column.cast(pa.float64()).to_numpy(zero_copy_only=False))
                found[name] = {"mean": mean, "std": std}
            else:
                found[name] = {"categories": list(self._vocabulary(name, self._lists(name, kinds[name])))}
        return found

    def _lists(self, name: str, kind: str) -> list[list[Hashable] | None]:
        entries = self._table().column(name).to_pylist()
        return entries if kind == "categorical_list" else [[value] for value in entries]

    def _scale(self, name: str, values: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation over what occurs in training."""
        reference = values[np.isfinite(values) & self.seen]
        if reference.size == 0:
            raise UserError(
                f"{self.owner} feature {name!r} is empty for everything that occurs in training; leave it out"
            )
        return float(reference.mean()), max(float(reference.std()), 1e-12)

    def _read(self, name: str, dim: int, asked_by: str, reduction: ListReduction) -> EntityFeature:
        specs = {
            spec.name: spec.kind for spec in self.dataset.feature_specs(self.owner) if spec.kind in KINDS
        }
        if name not in specs:
            known = ", ".join(specs) or "none"
            where = f"{self.owner} feature of {self.dataset.manifest.name}"
            raise UserError(f"{asked_by}: {name!r} is no {where}; known: {known}")
        kind = specs[name]
        column = self._table().column(name).combine_chunks()
        if kind == "numerical":
            return EntityFeature(EmbeddingSpec(name, "numerical", dim), self._numbers(name, column))
        lists = self._lists(name, kind)
        vocabulary = self._vocabulary(name, lists)
        ids = self._ids(name, lists, vocabulary)
        if kind == "categorical":
            return EntityFeature(EmbeddingSpec(name, "categorical", dim, len(vocabulary)), ids[:, 0])
        spec = EmbeddingSpec(name, "categorical_list", dim, len(vocabulary), list_reduction=reduction)
        return EntityFeature(spec, ids)

    def _table(self) -> pa.Table:
        table = self.dataset.item_features() if self.owner == "item" else self.dataset.user_features()
        assert table is not None  # the manifest names features
        return table

    def _vocabulary(self, name: str, lists: list[list[Hashable] | None]) -> dict[Hashable, int]:
        """Category to id 1..C, in the categories' order."""
        found = {
            value for row, seen in zip(lists, self.seen) if seen for value in row or () if value is not None
        }
        if not found:
            raise UserError(
                f"{self.owner} feature {name!r} is empty for everything that occurs in training; leave it out"
            )
        return {value: number for number, value in enumerate(sorted(found, key=str), start=1)}

    def _ids(
        self, name: str, lists: list[list[Hashable] | None], vocabulary: dict[Hashable, int]
    ) -> torch.Tensor:
        """``[1 + n, K]`` int64, padded with 0; row 0 is padding."""
        entries = [[value for value in row or () if value is not None] or [None] for row in lists]
        lengths = torch.tensor([len(row) for row in entries])
        flat = category_ids([value for row in entries for value in row], vocabulary, name)
        self._warn_missing(name, int((flat == 0).sum()), "share the unknown bucket")
        rows = torch.arange(1, len(entries) + 1).repeat_interleave(lengths)
        places = torch.arange(len(flat)) - (lengths.cumsum(0) - lengths)[rows - 1]
        ids = torch.zeros(len(entries) + 1, int(lengths.max()), dtype=torch.int64)
        ids[rows, places] = flat.masked_fill(flat == 0, len(vocabulary) + 1)
        return ids

    def _numbers(self, name: str, column: pa.Array) -> torch.Tensor:
        """``[1 + n]`` float32 with mean 0 and variance 1 over what occurs in training; missing ones are 0."""
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        known = np.isfinite(values)
        self._warn_missing(name, int((~known).sum()), "count as the mean")
        mean, std = self._scale(name, values)
        scaled = (values - mean) / std
        return torch.from_numpy(np.concatenate([[0.0], np.where(known, scaled, 0.0)])).float()

    def _warn_missing(self, name: str, count: int, consequence: str) -> None:
        if count:
            logging.warning(
                "%s feature %s: %d values are missing and %s", self.owner, name, count, consequence
            )


def class_assignment(feature: EntityFeature) -> torch.Tensor:
    """``[C, V]`` bool: which item (id i + 1) has which category; items of the unknown bucket are a class of
    their own.
    """
    values = feature.values[1:]
    ids = values if values.dim() == 2 else values[:, None]
    assignment = torch.zeros(feature.spec.cardinality + 2, len(ids), dtype=torch.bool)
    assignment[ids.T, torch.arange(len(ids))] = True
    assignment[0] = False
    return assignment[assignment.any(1)]
