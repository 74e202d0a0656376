"""Checks of the settings' values; each raises `UserError` naming the setting and what it may be."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from generative_recommenders.errors import UserError

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "tuple": (tuple, list),
}


def check_types(settings: Any, owner: str) -> None:
    """UserError naming the first field whose value is not of its declared type."""
    for each in dataclasses.fields(settings):
        declared, value = str(each.type), getattr(settings, each.name)
        if value is None and "None" in declared:
            continue
        if not _is_of(value, declared.partition(" | ")[0]):
            raise UserError(f"{owner}.{each.name} must be of type {declared}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{owner}.{each.name} must be finite, got {value}")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(f"{owner}.{each.name} must be below 2^63, got {value}")


def _is_of(value: Any, declared: str) -> bool:
    """declared: ``int``, ``tuple[str, ...]``, ``dict[str, float]`` and their like; entries are looked at too."""
    kind, _, inner = declared.partition("[")
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        return False
    entries: Any = value.values() if isinstance(value, dict) else value
    return not inner or all(_is_of(entry, re.findall(r"\w+", inner)[-1]) for entry in entries)


def check_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"train_fn.{name} must be above 0, got {getattr(settings, name)}")


def check_not_negative(settings: Any, *names: str, owner: str = "train_fn") -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise UserError(f"{owner}.{name} must be 0 or more, got {getattr(settings, name)}")


def check_weights(settings: Any, name: str, owner: str = "train_fn") -> None:
    """A dict of finite numbers by name, none of them negative."""
    for key, value in getattr(settings, name).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(key, str) or not number or not 0 <= value < math.inf:
            raise UserError(f"{owner}.{name} must give numbers of 0 or more by name, got {key!r}: {value!r}")


def check_share(settings: Any, *names: str, owner: str = "train_fn") -> None:
    for name in names:
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"{owner}.{name} must be in [0, 1), got {getattr(settings, name)}")


def check_choice(settings: Any, name: str, choices: tuple[str, ...], owner: str = "train_fn") -> None:
    if getattr(settings, name) not in choices:
        raise UserError(f"{owner}.{name} {getattr(settings, name)!r} is unknown; known: {', '.join(choices)}")
