"""New items, which a trained item tower scores by their features alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from absl import logging

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.two_tower import ItemTowerEmbedding
from generative_recommenders.modeling.feature_embeddings import EmbeddingSpec
from generative_recommenders.modeling.items import ItemEmbedding
from generative_recommenders.retrieval.frames import as_numbers


def add_rows(items: ItemEmbedding, frame: pl.DataFrame, encodings: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds items V + 1 and on, one per row of features.

    frame: a column per feature of the tower, with lists for lists of categories. encodings: of `Catalogue.facts`.
    Categories unknown to training add nothing and are counted in a warning. UserError where there is no tower, it reads
    the item's id, a column is missing, or the checkpoint does not hold the categories.
    """
    if not isinstance(items, ItemTowerEmbedding) or items.uses_item_id:
        raise UserError(
            "add_items: the model scores items by what it learned of their ids; train TwoTower with "
            "item_tower.features and without 'item_id' in them"
        )
    columns = [_values(spec, frame, encodings) for spec in items.tower.embedder.schema]
    table = items.features
    with torch.no_grad():
        for number, values in enumerate(columns):
            old = table.get_buffer(f"feature{number}")
            both = [old, values.to(old)]
            if old.dim() == 2:
                width = max(each.shape[1] for each in both)
                both = [F.pad(each, (0, width - each.shape[1])) for each in both]
            setattr(table, f"feature{number}", torch.cat(both))
        weight = items.table
        items.table = torch.nn.Parameter(
            torch.cat([weight, weight.new_zeros(len(frame), weight.shape[1])]),
            requires_grad=weight.requires_grad,
        )
    items.num_items += len(frame)


def _values(spec: EmbeddingSpec, frame: pl.DataFrame, encodings: Mapping[str, Mapping[str, Any]]) -> torch.Tensor:
    if spec.name not in frame.columns:
        raise UserError(f"add_items: the item tower reads {spec.name}, and the items have no such column")
    if spec.name not in encodings:
        raise UserError(
            f"add_items: the checkpoint does not hold the values of {spec.name}: train on with this release for that"
        )
    encoding, column = encodings[spec.name], frame[spec.name]
    if spec.kind == "numerical":
        scaled = (as_numbers(column, pl.Float64).to_numpy() - encoding["mean"]) / encoding["std"]
        return torch.from_numpy(np.where(np.isfinite(scaled), scaled, 0.0)).float()
    listed = spec.kind == "categorical_list"
    ids = {str(value): number for number, value in enumerate(encoding["categories"], start=1)}

    def category(value: Any) -> int:
        """Its id, 0 for unknown ones. Integers become floats where one is missing."""
        whole = isinstance(value, float) and value.is_integer()
        return ids.get(str(value)) or (ids.get(str(int(value)), 0) if whole else 0)

    # a value alone is a list of one
    rows = [row if isinstance(row, list) else [row] for row in column.to_list()]
    found = [[category(value) for value in row if value is not None] or [spec.cardinality + 1] for row in rows]
    unknown = sum(row.count(0) for row in found)
    if unknown:
        logging.warning("add_items: %d values of %s were not in training and add nothing", unknown, spec.name)
    width = max((len(row) for row in found), default=1) if listed else 1
    filled = torch.tensor([row + [0] * (width - len(row)) for row in found], dtype=torch.int64).view(-1, width)
    return filled if listed else filled[:, 0]
