"""The start of every program, done once where programs are forked from: parts registered, their options' models
built."""

from __future__ import annotations

from generative_recommenders.commands.lists import register_built_in_parts
from generative_recommenders.config.registry import REGISTRIES

register_built_in_parts()
MODELS = [part.options for registry in REGISTRIES.values() for part in registry.parts()]
