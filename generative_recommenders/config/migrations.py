"""Settings of older releases, read as those of today.

They are read here and not in `checkpoint`, since `RunSettings.from_json` lies below it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from generative_recommenders.errors import UserError

GROUPS = (
    "train",
    "data",
    "model",
    "items",
    "loss",
    "negatives",
    "optimizer",
    "schedule",
    "evaluation",
    "checkpoints",
)
OWNERS = {
    **dict.fromkeys(GROUPS, "train_fn"),
    "queries": "item_tower",
    "encoder": "get_sequential_encoder",
    "loader": "create_data_loader",
    "weighted_loss": "get_weighted_loss",
    "similarity": "get_similarity_function",
    "sasrec": "sasrec_encoder",
    "hstu": "hstu_encoder",
    "diff_transformer": "diff_transformer_encoder",
    "transformer": "transformer_encoder",
    "sce": "sce",
    "mol": "create_mol_interaction_module",
}
"""Sections that settings had before they went by their owners in gin, as of 0.1.0 (``train`` and one for each part)."""


def by_gin_name(data: dict[str, Any], owners: Collection[str]) -> dict[str, Any]:
    """Settings as JSON by the names that gin files write, options of parts that are not loaded among them.

    owners: what stands before names of settings. UserError for sections that are none.
    """
    values: dict[str, Any] = {}
    for section, given in data.items():
        owner = OWNERS.get(section, section)
        if section not in ("options", *OWNERS, *owners):
            raise UserError(f"settings have an unknown section: {str(section)[:200]!r}")
        parts = given if section == "options" else {owner: given}
        if not isinstance(parts, dict) or not all(isinstance(each, dict) for each in parts.values()):
            raise UserError(f"settings section {section!r} is no object but {str(given)[:40]!r}")
        values |= {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}
    return values
