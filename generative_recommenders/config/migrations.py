"""Settings of older releases, read as those of today.

They are read here and not in `checkpoint`, since `RunSettings.from_json` lies below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generative_recommenders.errors import UserError

PARTS = {
    "sasrec": "sasrec_encoder",
    "hstu": "hstu_encoder",
    "diff_transformer": "diff_transformer_encoder",
    "transformer": "transformer_encoder",
    "item_tower": "item_tower",
    "sce": "sce",
    "mol": "create_mol_interaction_module",
}
"""Sections of releases up to 0.1.0 that held the options of a part, and the part's gin name."""


def grouped(data: dict[str, Any], fields: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Settings as JSON in today's groups. Up to 0.1.0 ``train`` held all of ``train_fn``, and each part had a section.

    fields: published name to group and field. What is no published name stays for the check of the groups.
    """
    old = {
        **{name: PARTS[name] for name in PARTS if name in data},
        **({"train": "train_fn"} if "train" in data else {}),
    }
    groups: dict[str, Any] = {name: values for name, values in data.items() if name not in old}
    for section, owner in old.items():
        if not isinstance(data[section], dict):
            raise UserError(f"settings section {section!r} is no object but {str(data[section])[:40]!r}")
        for name, value in data[section].items():
            if f"{owner}.{name}" in fields or section == "train":
                group, field = fields.get(f"{owner}.{name}", ("schedule", name))
                groups.setdefault(group, {})[field] = value
            else:
                groups.setdefault("options", {}).setdefault(owner, {})[name] = value
    return groups
