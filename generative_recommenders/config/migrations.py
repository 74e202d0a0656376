"""Settings of older releases, read as those of today.

They are read here and not in `checkpoint`, since `RunSettings.from_json` lies below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generative_recommenders.errors import UserError


def grouped(data: dict[str, Any], fields: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Settings as JSON, with those of releases up to 0.1.0 in their groups: there ``train`` held all of ``train_fn``.

    fields: published name to group and field. What is no published name stays for the check of the groups.
    """
    if "train" not in data:
        return data
    flat = data["train"]
    if not isinstance(flat, dict):
        raise UserError(f"settings section 'train' is no object but {str(flat)[:40]!r}")
    groups: dict[str, Any] = {name: values for name, values in data.items() if name != "train"}
    for name, value in flat.items():
        group, field = fields.get(f"train_fn.{name}", ("schedule", name))
        groups.setdefault(group, {})[field] = value
    return groups
