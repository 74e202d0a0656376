"""Registered parts with the options that the settings give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generative_recommenders.config.published import PUBLISHED
from generative_recommenders.config.registry import Registry
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError


def build_part(settings: RunSettings, registry: Registry, name: str, supplies: Mapping[str, Any]) -> Any:
    """The part of a name; UserError for an unknown name and for options that cannot be. supplies: see `Part.build`."""
    return registry[name].build(options_of(settings, registry, name), supplies)


def options_of(settings: RunSettings, registry: Registry, name: str) -> dict[str, Any]:
    """The options that the settings give a part; UserError where they choose by a published name what it has no option
    for, and what is learned would not be what they say.
    """
    fields = registry[name].options.model_fields
    for published in settings.published:
        for target in PUBLISHED[published]:
            if target.registry is registry and target.required and target.option not in fields:
                having = [part.name for part in registry.parts() if target.option in part.options.model_fields]
                raise UserError(f"{published} acts with {', '.join(having)}, not with {name}: unset it")
    return settings.part_options(registry[name])
