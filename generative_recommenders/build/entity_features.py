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

MAX_BYTES = 8 << 30
"""Of one tensor of a feature, which is as wide as the longest list."""


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
        """The encoding of values that `read` applies, as JSON: categories in the order of their ids, or mean and
        deviation."""
        kinds, found = self._kinds(), dict[str, dict[str, Any]]()
        for name in names:
            if kinds[name] == "numerical":
                _, mean, std = self._numbers(name)
                found[name] = {"mean": mean, "std": std}
            else:
                found[name] = {"categories": list(self._categories(name, kinds[name])[1])}
        return found

    def _kinds(self) -> dict[str, str]:
        specs = self.dataset.feature_specs(self.owner)
        return {spec.name: spec.kind for spec in specs if spec.kind != "text"}

    def _read(self, name: str, dim: int, asked_by: str, reduction: ListReduction) -> EntityFeature:
        kinds = self._kinds()
        if name not in kinds:
            known = ", ".join(kinds) or "none"
            where = f"{self.owner} feature of {self.dataset.manifest.name}"
            raise UserError(f"{asked_by}: {name!r} is no {where}; known: {known}")
        if kinds[name] == "numerical":
            numbers, mean, std = self._numbers(name)
            known_ones = np.isfinite(numbers)
            self._warn_missing(name, int((~known_ones).sum()), "count as the mean")
            scaled = np.where(known_ones, (numbers - mean) / std, 0.0)
            values = torch.from_numpy(np.concatenate([[0.0], scaled])).float()
            return EntityFeature(EmbeddingSpec(name, "numerical", dim), values)
        lists, vocabulary = self._categories(name, kinds[name])
        lengths = torch.tensor([len(row) for row in lists])
        flat = category_ids([value for row in lists for value in row], vocabulary, name)
        self._warn_missing(name, int((flat == 0).sum()), "share the unknown bucket")
        longest = int(lengths.max())
        _check_size(8 * (len(lists) + 1) * longest, f"{self.owner} feature {name!r}, with lists of up to {longest},")
        ids = torch.zeros(len(lists) + 1, longest, dtype=torch.int64)  # row 0 is padding
        ids[1:][torch.arange(ids.shape[1]) < lengths[:, None]] = flat.masked_fill(flat == 0, len(vocabulary) + 1)
        if kinds[name] == "categorical":
            return EntityFeature(EmbeddingSpec(name, "categorical", dim, len(vocabulary)), ids[:, 0])
        spec = EmbeddingSpec(name, "categorical_list", dim, len(vocabulary), list_reduction=reduction)
        return EntityFeature(spec, ids)

    def _column(self, name: str) -> pa.Array:
        table = self.dataset.item_features() if self.owner == "item" else self.dataset.user_features()
        assert table is not None  # the manifest names features
        return table.column(name).combine_chunks()

    def _numbers(self, name: str) -> tuple[np.ndarray, float, float]:
        """Values ``[n]``, and by which mean and deviation they are scaled: those of what occurs in training, or a
        deviation of 1 where that is one value alone."""
        values = self._column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        reference = values[np.isfinite(values) & self.seen]
        if reference.size == 0:
            raise self._empty(name)
        deviation = float(reference.std()) if reference.min() < reference.max() else 1.0
        return values, float(reference.mean()), deviation

    def _categories(self, name: str, kind: str) -> tuple[list[list[Hashable]], dict[Hashable, int]]:
        """The categories of each, [None] where there are none, and category to id 1..C, in the categories' order."""
        entries = self._column(name).to_pylist()
        rows = entries if kind == "categorical_list" else [[value] for value in entries]
        lists = [[value for value in row or () if value is not None] for row in rows]
        found = {value for row, seen in zip(lists, self.seen) if seen for value in row}
        if not found:
            raise self._empty(name)
        vocabulary = {value: number for number, value in enumerate(sorted(found, key=str), start=1)}
        return [row or [None] for row in lists], vocabulary

    def _empty(self, name: str) -> UserError:
        return UserError(f"{self.owner} feature {name!r} is empty for everything that occurs in training; leave it out")

    def _warn_missing(self, name: str, count: int, consequence: str) -> None:
        if count:
            logging.warning("%s feature %s: %d values are missing and %s", self.owner, name, count, consequence)


def _check_size(size: int, what: str) -> None:
    """UserError for a tensor of more than `MAX_BYTES`, before it is made."""
    if size > MAX_BYTES:
        raise UserError(f"{what} takes {size / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.1f}: leave it out")


def class_assignment(feature: EntityFeature) -> torch.Tensor:
    """``[C, V]`` bool: which item (id i + 1) has which category; items of the unknown bucket are a class of
    their own.

    UserError where it would take more than `MAX_BYTES`.
    """
    values = feature.values[1:]
    ids = values if values.dim() == 2 else values[:, None]
    rows = feature.spec.cardinality + 2
    _check_size(rows * len(ids), f"a table of classes by {feature.spec.name!r}, with {rows - 2} categories,")
    assignment = torch.zeros(rows, len(ids), dtype=torch.bool)
    assignment[ids.T, torch.arange(len(ids))] = True
    assignment[0] = False
    return assignment[assignment.any(1)]
