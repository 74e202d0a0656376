"""Registered parts with the options that the settings give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generative_recommenders.config.registry import Registry
from generative_recommenders.config.schema import RunSettings


def build_part(settings: RunSettings, registry: Registry, name: str, supplies: Mapping[str, Any]) -> Any:
    """The part of a name; UserError for an unknown name and for options that cannot be. supplies: see `Part.build`."""
    return registry[name].build(settings.part_options(registry, name), supplies)
