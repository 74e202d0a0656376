"""RePlay's default transforms of SasRec and TwoTower, for each split of a data module."""

from __future__ import annotations

from torch import nn

from generative_recommenders.compat.replay.data.schema import TensorSchema, item_id_feature
from generative_recommenders.compat.replay.nn.transform import (
    GroupTransform,
    NextTokenTransform,
    RenameTransform,
    UnsqueezeTransform,
)

__all__ = ["make_default_sasrec_transforms", "make_default_twotower_transforms"]


class SplitTransforms(dict[str, list[nn.Module]]):
    """Transforms by split; "validation" is read as "validate", Lightning's name."""

    def __missing__(self, split: str) -> list[nn.Module]:
        if split == "validation" and "validate" in self:
            return self["validate"]
        raise KeyError(split)


def make_default_sasrec_transforms(
    tensor_schema: TensorSchema, query_column: str = "query_id"
) -> dict[str, list[nn.Module]]:
    """Transforms for "train", "validate", "test" and "predict" batches of a SasRec.

    Train: next-item labels with a trailing axis, ``padding_mask``, ``target_padding_mask``, and the schema's features
    grouped as ``feature_tensors``. The others: ``padding_mask`` and ``feature_tensors``. All other columns stay.
    """
    item = item_id_feature(tensor_schema, "make_default_sasrec_transforms").name
    group = {"feature_tensors": list(tensor_schema.names)}
    train: list[nn.Module] = [
        NextTokenTransform(label_field=item, query_features=[query_column, f"{query_column}_mask"]),
        RenameTransform({f"{item}_mask": "padding_mask", "positive_labels_mask": "target_padding_mask"}),
        UnsqueezeTransform("target_padding_mask", -1),
        UnsqueezeTransform("positive_labels", -1),
        GroupTransform(group),
    ]
    others: dict[str, list[nn.Module]] = {
        split: [RenameTransform({f"{item}_mask": "padding_mask"}), GroupTransform(group)]
        for split in ("validate", "test", "predict")
    }
    return SplitTransforms(train=train, **others)


make_default_twotower_transforms = make_default_sasrec_transforms
"""Both models read the same batch."""
