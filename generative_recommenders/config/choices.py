"""Choices by name: one table each, and one way to look them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError

Built = TypeVar("Built")


def look_up(table: Mapping[str, Built], name: str, what: str) -> Built:
    """``table[name]``, or UserError with the known names."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]


def uses_item_tower(settings: RunSettings) -> bool:
    """Whether candidates are scored through an item tower."""
    return settings.train.main_module == "TwoTower" or settings.train.embedding_module_type == "item_tower"
