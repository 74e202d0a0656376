"""Settings of a run, which go to JSON and back: a checkpoint is rebuilt from their JSON form alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, Self

from absl import logging
from pydantic import Field, model_validator

from generative_recommenders.config.fields import Section, checked_value, nearest
from generative_recommenders.config.migrations import by_gin_name
from generative_recommenders.config.published import PUBLISHED, Target, targets_in
from generative_recommenders.config.registry import (
    ENCODERS,
    ITEM_EMBEDDINGS,
    LOSSES,
    NEGATIVE_SAMPLERS,
    REGISTRIES,
    SIMILARITIES,
    TOP_K_MODULES,
    Part,
    Registry,
    named_top_k,
    parts_by_gin_name,
)
from generative_recommenders.config.sections import (
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    FineTuningSettings,
    ItemSettings,
    LoaderSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    QuerySettings,
    ScheduleSettings,
    SimilaritySettings,
    UpdateSettings,
    WeightedLossSettings,
)
from generative_recommenders.errors import UserError


class RunSettings(Section):
    """All of a run's choices, in groups; `bind` takes them by the names that gin files write."""

    gin_name: ClassVar[str] = "settings"

    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    items: ItemSettings = Field(default_factory=ItemSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    negatives: NegativesSettings = Field(default_factory=NegativesSettings)
    updates: UpdateSettings = Field(default_factory=UpdateSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    fine_tuning: FineTuningSettings = Field(default_factory=FineTuningSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings)
    queries: QuerySettings = Field(default_factory=QuerySettings)
    loader: LoaderSettings = Field(default_factory=LoaderSettings)
    weighted_loss: WeightedLossSettings = Field(default_factory=WeightedLossSettings)
    similarity: SimilaritySettings = Field(default_factory=SimilaritySettings)
    published: dict[str, Any] = Field(default_factory=dict)
    """Options of the chosen parts by their published names; see `config.published`. What is not given has its
    default."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options by the parts' own gin names, those of plug-ins among them; what is not given has its default."""

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> Self:
        if self.schedule.early_stopping_patience is not None and self.data.protocol == "paper":
            raise ValueError(
                'train_fn.early_stopping_patience needs validation targets, and protocol "paper" has none: unset it'
            )
        return self

    def bind(self, values: Mapping[str, Any]) -> RunSettings:
        """The settings with other values, by the names that gin files write: ``{"train_fn.loss_module": "CE"}``.

        UserError for a name that is none, and for a value that cannot be.
        """
        groups: dict[str, dict[str, Any]] = {}
        options = {owner: dict(given) for owner, given in self.options.items()}
        parts = parts_by_gin_name()
        for name, value in values.items():
            owner, _, option = name.partition(".")
            if name in FIELDS:
                group, field = FIELDS[name]
                groups.setdefault(group, {})[field] = value
            elif name not in PUBLISHED:
                if owner not in parts:
                    raise UserError(f"there is no setting {name!r}{nearest(name, NAMES)}")
                options.setdefault(owner, {})[option] = parts[owner].checked(option, value)
        changed = {group: getattr(self, group).changed(**given) for group, given in groups.items()}
        given = {
            name: checked_value(name, value)
            for name, value in values.items()
            if name in PUBLISHED and name not in FIELDS
        }
        published = {**self.published, **given}
        chosen = self.changed(**changed, published=published, options=options)
        for name in list(published):
            readers = chosen.readers(name)
            # What is bound last counts, by the published or by the part's own name.
            for part, target in readers:
                if name in given and f"{part.gin_name}.{target.option}" not in values:
                    options.get(part.gin_name, {}).pop(target.option, None)
            if readers and all(target.option in options.get(part.gin_name, {}) for part, target in readers):
                del published[name]
        return chosen.changed(published=chosen._differing_published(published), options=_differing(options))

    def readers(self, published: str) -> list[tuple[Part, Target]]:
        """The chosen parts that a published name fills, and their options."""
        targets = ((part, targets_in(part).get(published)) for part in self.chosen_parts())
        return [(part, target) for part, target in targets if target is not None]

    def _differing_published(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is given by published names, checked, without that which the chosen parts have by default, or any part
        where they lack the option. None is as good as not given.
        """
        kept = {}
        for name in [name for name, value in given.items() if value is not None]:
            readers = self.readers(name) or _possible_readers(name)
            kept[name] = given[name]
            for part, target in readers:
                kept[name] = part.checked(target.option, given[name], called=name)
            if readers and all(kept[name] == target.default_of(part) for part, target in readers):
                del kept[name]
        return kept

    @property
    def encoder_name(self) -> str:
        """The encoder of the histories: ``main_module``, or its query tower's where it has one."""
        name = self.model.main_module
        query = self._option(ENCODERS[name], "query_module") if name in ENCODERS else None
        return name if query is None else str(query)  # of any type until `bind` has checked it

    @property
    def item_embedding(self) -> str:
        """The item embedding: the encoder's own where it brings one, as TwoTower does, or that of the settings."""
        name = self.model.main_module
        own = getattr(ENCODERS[name].make, "item_embedding", None) if name in ENCODERS else None
        return own or self.items.embedding_module_type

    @property
    def uses_item_tower(self) -> bool:
        """Whether candidates are scored through an item tower."""
        return self.item_embedding == "item_tower"

    @property
    def uses_times(self) -> bool:
        """Whether the encoder has a bias by time."""
        if self.encoder_name not in ENCODERS:
            return False
        encoder = ENCODERS[self.encoder_name]
        needed = getattr(encoder.make, "time_options", ())
        return bool(needed) and all(self._option(encoder, option) for option in needed)

    @property
    def similarity_name(self) -> str:
        """The registered name of the similarity, which "" stands for as published."""
        return self.model.interaction_module_type or "DotProduct"

    @property
    def measured_part(self) -> str:
        """The part of the split that epochs are measured on."""
        return "test" if self.data.protocol == "paper" else "validation"

    def value(self, gin_name: str) -> Any:
        """The value of any name that gin binds, as ``train_fn.num_epochs`` or ``hstu_encoder.dqk``; its default where
        it is not given. None for a part that is not registered and an option that is not given.
        """
        if gin_name in FIELDS:
            group, field = FIELDS[gin_name]
            return getattr(getattr(self, group), field)
        if gin_name in PUBLISHED:
            for part, target in self.readers(gin_name):
                return self._option(part, target.option)
            defaults = [target.default_of(part) for part, target in _possible_readers(gin_name)]
            return self.published.get(gin_name, defaults[0] if defaults else None)
        owner, _, name = gin_name.partition(".")
        own = parts_by_gin_name().get(owner)
        return self.options.get(owner, {}).get(name) if own is None else self._option(own, name)

    def part_options(self, part: Part) -> dict[str, Any]:
        """The options of a part: its own, and those that published names fill where its own are not given."""
        own = dict(self.options.get(part.gin_name, {}))
        own |= self._numbers_of(part)
        for published, target in targets_in(part).items():
            value = self.value(published) if published in FIELDS else self.published.get(published, target.default)
            if value is not None:
                own.setdefault(target.option, value)
        return own

    def _numbers_of(self, part: Part) -> dict[str, int]:
        """The options of a search that stand in its name."""
        if part.registry is not TOP_K_MODULES:
            return {}
        named, numbers = named_top_k(self.model.top_k_method)
        return numbers if named is part else {}

    def _option(self, part: Part, option: str) -> Any:
        """The value of a part's option; None where there is no such option, or it has neither value nor default."""
        if option not in part.options.model_fields:
            return None
        value = self.part_options(part).get(option, part.default(option))
        return None if value is ... else value

    def named_parts(self) -> dict[Registry, str]:
        """The name of the part of each kind that the settings choose, registered or not; the top-k module, whose name
        may have numbers after it, is not among them."""
        kinds = [each for each in REGISTRIES.values() if each.setting in FIELDS and each is not TOP_K_MODULES]
        of_settings = {registry: self.value(registry.setting) for registry in kinds}
        return {
            **of_settings,
            ENCODERS: self.encoder_name,
            ITEM_EMBEDDINGS: self.item_embedding,
            SIMILARITIES: self.similarity_name,
        }

    def chosen_parts(self) -> list[Part]:
        """The registered parts of this run; no negative sampler where the loss draws no negatives."""
        chosen = [each for each in self.named_parts().items() if each[0] is not NEGATIVE_SAMPLERS]
        if self.encoder_name != self.model.main_module:
            chosen.append((ENCODERS, self.model.main_module))
        if self.draws_negatives:
            sampler = self.negatives.sampling_strategy
            members = self._option(NEGATIVE_SAMPLERS[sampler], "shares") if sampler in NEGATIVE_SAMPLERS else None
            # Of a mixture; not checked yet where `bind` asks.
            chosen += [(NEGATIVE_SAMPLERS, each) for each in (sampler, *(members if isinstance(members, dict) else ()))]
        with suppress(UserError):
            chosen.append((TOP_K_MODULES, named_top_k(self.model.top_k_method)[0].name))
        # Others, of a slip or of a plug-in that is not loaded, are named when they are built.
        return [registry[name] for registry, name in chosen if name in registry]

    @property
    def draws_negatives(self) -> bool:
        """Whether the loss is of sampled negatives."""
        name = self.loss.loss_module
        return name not in LOSSES or bool(getattr(LOSSES[name].make, "needs_negatives", False))

    def plugin_parts(self) -> list[dict[str, Any]]:
        """The record in a checkpoint of each part that comes from a plug-in."""
        found = []
        for part in self.chosen_parts():
            if part.plugin is not None:
                options = part.option_values(self.part_options(part))
                record = {"kind": part.registry.kind, "name": part.name, "options": options}
                found.append({**record, "plugin": part.plugin.source, "sha256": part.plugin.sha256})
        return found

    def to_json(self) -> dict[str, Any]:
        """Settings for a checkpoint: with the defaults of the chosen parts, so that a later release may change them."""
        sections: dict[str, Any] = {}
        for name in NAMES:
            readers = self.readers(name) if name in PUBLISHED else []
            own = [target.option in self.options.get(part.gin_name, {}) for part, target in readers]
            if name in FIELDS or name in self.published or (readers and not any(own)):
                owner, _, field = name.partition(".")
                sections.setdefault(owner, {})[field] = self.value(name)
        options = {owner: dict(given) for owner, given in self.options.items()}
        for part in self.chosen_parts():
            filled = {target.option for target in targets_in(part).values()} | self._numbers_of(part).keys()
            for option, value in part.option_values(self.part_options(part)).items():
                # The part's own default alone may be infinite, so that what is left out comes back by itself.
                endless = isinstance(value, float) and not math.isfinite(value)  # has no form in JSON
                if option not in filled and not endless:
                    options.setdefault(part.gin_name, {}).setdefault(option, value)
        return {**sections, "options": options, "plugins": self.plugin_parts()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunSettings:
        """From `to_json`'s form, which anybody may have written; UserError names a key that does not exist or a value
        that cannot be."""
        if not isinstance(data, dict):
            raise UserError(f"settings are no object but {str(data)[:40]!r}")
        data = dict(data)
        check_plugins(data.pop("plugins", []))
        owners = {name.partition(".")[0] for name in NAMES}
        known, unknown = {*owners, *parts_by_gin_name()}, dict[str, dict[str, Any]]()
        values = by_gin_name(data, owners)
        for name in [name for name in values if name.partition(".")[0] not in known]:
            # Of a plug-in that is not loaded, and that the run does not need.
            part, _, option = name.partition(".")
            unknown.setdefault(part, {})[option] = values.pop(name)
        try:
            return cls(options=unknown).bind(values)
        except UserError as error:
            raise UserError(str(error)[:300]) from error


def _possible_readers(published: str) -> list[tuple[Part, Target]]:
    """A part that has the option of a published name, for a run that has none."""
    for target in PUBLISHED[published]:
        for part in target.registry.parts():
            if targets_in(part).get(published) is target:
                return [(part, target)]
    return []


def _differing(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options without those that are the part's own defaults. Where a published name fills an option too, what is given
    stays: it goes before the published one's value.
    """
    kept: dict[str, dict[str, Any]] = {owner: dict(given) for owner, given in options.items()}
    parts = parts_by_gin_name()
    for owner in options.keys() & parts.keys():
        filled = {target.option for target in targets_in(parts[owner]).values()}
        for option, value in options[owner].items():
            if option not in filled and value == parts[owner].default(option):
                del kept[owner][option]
    return {owner: given for owner, given in kept.items() if given}


def check_plugins(records: Any) -> None:
    """UserError naming the plug-ins of parts that are not registered; a warning where a plug-in's file has changed.

    records: what `RunSettings.plugin_parts` wrote; nothing in them is imported.
    """
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UserError(f"settings section 'plugins' is no list of objects but {str(records)[:40]!r}")
    registries = {registry.kind: registry for registry in REGISTRIES.values()}
    missing: dict[str, str] = {}
    for record in records:
        kind, name, source = (str(record.get(key))[:200] for key in ("kind", "name", "plugin"))
        if kind not in registries or name not in registries[kind]:
            missing[f"{kind} {name!r}"] = source
            continue
        plugin = registries[kind][name].plugin
        found = plugin.sha256 if plugin else None
        if found != record.get("sha256"):
            warn_changed_plugin(kind, name, source)
    if missing:
        sources = list(dict.fromkeys(missing.values()))
        come = "comes from a plug-in" if len(missing) == 1 else "come from plug-ins"
        flags = " ".join(f"--plugin={source}" for source in sources)
        raise UserError(f"{', '.join(missing)} {come}: give {flags}, in Python plugins={sources}")


@cache
def warn_changed_plugin(kind: str, name: str, source: str) -> None:
    """Once for each part."""
    logging.warning("%s %r was saved with another version of %s than is loaded now", kind, name, source)


GROUPS: dict[str, type[Section]] = {
    name: kind
    for name, field in RunSettings.model_fields.items()
    if isinstance(kind := field.annotation, type) and issubclass(kind, Section)
}
"""Groups of `RunSettings` and their classes."""

FIELDS: dict[str, tuple[str, str]] = {
    f"{kind.gin_name}.{field}": (group, field) for group, kind in GROUPS.items() for field in kind.model_fields
}
"""The flat names, as ``train_fn.num_epochs``, and the group and field that each of them fills."""

NAMES = (*FIELDS, *(name for name in PUBLISHED if name not in FIELDS))
"""All names of settings; options of parts have their parts' names."""
