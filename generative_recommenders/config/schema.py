"""Settings of a run, which go to JSON and back: a checkpoint is rebuilt from their JSON form alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Self

from absl import logging
from pydantic import Field, model_validator

from generative_recommenders.config.fields import Section, nearest, validated
from generative_recommenders.config.migrations import grouped
from generative_recommenders.config.registry import (
    ENCODERS,
    INPUT_PREPROCESSORS,
    ITEM_EMBEDDINGS,
    LOSSES,
    NEGATIVE_SAMPLERS,
    OBJECTIVES,
    OPTIMIZERS,
    OUTPUT_POSTPROCESSORS,
    REGISTRIES,
    SEEN_FILTERS,
    SIMILARITIES,
    Registry,
    parts_by_gin_name,
)
from generative_recommenders.config.sections import (
    CheckpointSettings,
    DataSettings,
    EncoderSettings,
    EvaluationSettings,
    ItemSettings,
    LoaderSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    OptimizerSettings,
    QuerySettings,
    ScheduleSettings,
    SimilaritySettings,
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
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings)
    queries: QuerySettings = Field(default_factory=QuerySettings)
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    loader: LoaderSettings = Field(default_factory=LoaderSettings)
    weighted_loss: WeightedLossSettings = Field(default_factory=WeightedLossSettings)
    similarity: SimilaritySettings = Field(default_factory=SimilaritySettings)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of further parts, plug-ins among them, by gin name; what is not given has its default."""

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
            elif owner in parts:
                options.setdefault(owner, {}).update(parts[owner].checked({option: value}))
            else:
                raise UserError(f"there is no setting {name!r}{nearest(name, FIELDS)}")
        changed = {group: getattr(self, group).changed(**given) for group, given in groups.items()}
        return self.changed(**changed, options=_differing(options))

    @property
    def encoder_name(self) -> str:
        """The encoder of the histories: ``main_module``, or its query tower's where it has one."""
        name = self.model.main_module
        query = self.part_options(ENCODERS, name).get("query_module") if name in ENCODERS else None
        return name if query is None else str(query)

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
        name = self.encoder_name
        needed = getattr(ENCODERS[name].make, "time_options", ()) if name in ENCODERS else ()
        values = ENCODERS[name].option_values(self.part_options(ENCODERS, name)) if needed else {}
        return bool(needed) and all(values[option] for option in needed)

    def option(self, gin_name: str) -> Any:
        """The value of a part's option, as ``hstu_encoder.dqk``; its default where it is not given.

        None for a part that is not registered and an option that is not given.
        """
        owner, _, name = gin_name.partition(".")
        for registry in REGISTRIES.values():
            for part in registry.parts():
                if part.gin_name == owner and name in part.options.model_fields:
                    return part.option_values(self.part_options(registry, part.name)).get(name)
        return self.options.get(owner, {}).get(name)

    def part_options(self, registry: Registry, name: str) -> dict[str, Any]:
        """What a part is given: its own options, and those that published names fill where its own are not given."""
        part = registry[name]
        own = dict(self.options.get(part.gin_name, {}))
        for option, published in published_options(registry.kind, part.gin_name).items():
            if option in part.options.model_fields and (value := self.published(published)) is not None:
                own.setdefault(option, value)  # None leaves the part's own default
        return own

    def published(self, gin_name: str) -> Any:
        """The value of a published name, as ``train_fn.label_smoothing``."""
        group, field = FIELDS[gin_name]
        return getattr(getattr(self, group), field)

    def chosen_parts(self) -> list[tuple[Registry, str]]:
        """The parts of this run that come from registries."""
        chosen = [
            (ENCODERS, self.encoder_name),
            (LOSSES, self.loss.loss_module),
            (INPUT_PREPROCESSORS, self.model.input_preprocessor),
            (OUTPUT_POSTPROCESSORS, self.model.user_embedding_norm),
            (ITEM_EMBEDDINGS, self.item_embedding),
            (SIMILARITIES, self.model.interaction_module_type or "DotProduct"),
            (OBJECTIVES, self.loss.objective),
            (OPTIMIZERS, self.optimizer.optimizer),
            (SEEN_FILTERS, self.evaluation.seen_filter),
            (NEGATIVE_SAMPLERS, self.negatives.sampling_strategy),
        ]
        shares = (
            self.part_options(*chosen[-1]).get("shares", {}) if chosen[-1][1] in NEGATIVE_SAMPLERS else {}
        )
        if self.encoder_name != self.model.main_module:
            chosen.append((ENCODERS, self.model.main_module))
        return chosen + [(NEGATIVE_SAMPLERS, name) for name in shares]

    def plugin_parts(self) -> list[dict[str, Any]]:
        """What a checkpoint says of each part that comes from a plug-in."""
        found = []
        for registry, name in self.chosen_parts():
            plugin = registry[name].plugin if name in registry else None
            if plugin is not None:
                options = registry[name].option_values(self.part_options(registry, name))
                record = {"kind": registry.kind, "name": name, "options": options}
                found.append({**record, "plugin": plugin.source, "sha256": plugin.sha256})
        return found

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: with the defaults of the chosen parts, so that a later release may change them."""
        options = {owner: dict(given) for owner, given in self.options.items()}
        for registry, name in self.chosen_parts():
            if name not in registry:
                continue
            owner, filled = registry[name].gin_name, published_options(registry.kind, registry[name].gin_name)
            for option, value in registry[name].option_values(self.part_options(registry, name)).items():
                endless = isinstance(value, float) and not math.isfinite(value)  # has no form in JSON
                if option not in filled and not endless:
                    options.setdefault(owner, {}).setdefault(option, value)
        return {**self.model_dump(), "options": options, "plugins": self.plugin_parts()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunSettings:
        """From `to_json`'s form, which anybody may have written; UserError names a key that does not exist or a value
        that cannot be."""
        if not isinstance(data, dict):
            raise UserError(f"settings are no object but {str(data)[:40]!r}")
        data = grouped(dict(data), FIELDS)
        check_plugins(data.pop("plugins", []))
        options = _saved_options(data.pop("options", {}))
        unknown = sorted(set(data) - set(GROUPS))
        if unknown:
            raise UserError(f"settings have unknown sections: {', '.join(unknown)[:200]}")
        for name, values in data.items():
            if not isinstance(values, dict):
                raise UserError(f"settings section {name!r} is no object but {str(values)[:40]!r}")
        try:
            read = {name: GROUPS[name](**values) for name, values in data.items()}
            return validated(cls, {**read, "options": options}, "settings")
        except UserError as error:
            raise UserError(str(error)[:300]) from error


def _saved_options(options: Any) -> dict[str, dict[str, Any]]:
    """Options by gin name, checked where the part is known."""
    if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
        raise UserError(f"settings section 'options' is no object of objects but {str(options)[:40]!r}")
    parts = parts_by_gin_name()
    return _differing(
        {name: parts[name].checked(values) if name in parts else values for name, values in options.items()}
    )


def _differing(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options without those that are the part's own defaults. Where a published name fills an option too, what is given stays:
    it goes before the published one's value.
    """
    kept: dict[str, dict[str, Any]] = {owner: dict(given) for owner, given in options.items()}
    for registry in REGISTRIES.values():
        for part in registry.parts():
            filled, fields = published_options(registry.kind, part.gin_name), part.options.model_fields
            for option, value in options.get(part.gin_name, {}).items():
                field = fields[option]
                default = ... if field.is_required() else field.get_default(call_default_factory=True)
                if option not in filled and value == default:
                    del kept[part.gin_name][option]
    return {owner: given for owner, given in kept.items() if given}


def check_plugins(records: Any) -> None:
    """UserError naming the plug-in of a part that is not registered; a warning where the plug-in's file has changed.

    records: what `RunSettings.plugin_parts` wrote; nothing in them is imported.
    """
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UserError(f"settings section 'plugins' is no list of objects but {str(records)[:40]!r}")
    registries = {registry.kind: registry for registry in REGISTRIES.values()}
    for record in records:
        kind, name, source = (str(record.get(key))[:200] for key in ("kind", "name", "plugin"))
        if kind not in registries or name not in registries[kind]:
            raise UserError(f"{kind} {name!r} comes from a plug-in: give --plugin={source}")
        plugin = registries[kind][name].plugin
        found = plugin.sha256 if plugin else None
        if found != record.get("sha256"):
            warn_changed_plugin(kind, name, source)


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
    f"{kind.gin_name}.{field}": (group, field)
    for group, kind in GROUPS.items()
    for field in kind.model_fields
}
"""The published flat names, as ``train_fn.num_epochs``, and the group and field that each of them fills."""

PUBLISHED_OPTIONS: dict[str, dict[str, str]] = {
    "encoder": {
        "activation_checkpoint": "get_sequential_encoder.activation_checkpoint",
        "next_time": "train_fn.next_time",
    },
    "loss": {
        "label_smoothing": "train_fn.label_smoothing",
        "calibration": "train_fn.calibration",
        "threshold": "train_fn.rating_threshold",
    },
    "objective": {
        "num_positives": "train_fn.num_positives",
        "target_weights": "train_fn.target_weights",
        "mask_probability": "train_fn.mask_probability",
        "max_span_length": "train_fn.max_span_length",
        "permute_all": "train_fn.permute_all",
        "fakes_from": "train_fn.fakes_from",
        "tie_discriminator": "train_fn.tie_discriminator",
        "discriminator_weight": "train_fn.discriminator_weight",
    },
    "negative sampler": {
        "log_q_correction": "train_fn.log_q_correction",
        "power": "train_fn.popularity_power",
        "shares": "train_fn.mixed_shares",
        "selector": "train_fn.class_selector",
    },
    "input preprocessor": {
        "dropout_rate": "train_fn.dropout_rate",
        "rating_embedding_dim": "train_fn.rating_embedding_dim",
        "num_ratings": "train_fn.num_ratings",
    },
    "output postprocessor": {"eps": "train_fn.l2_norm_eps"},
    "item embedding": {"item_l2_norm": "train_fn.item_l2_norm", "l2_norm_eps": "train_fn.l2_norm_eps"},
    "similarity": {"temperature": "train_fn.temperature"},
    "create_mol_interaction_module": {"score_temperature": "train_fn.temperature"},
    "two_tower": {"query_module": "item_tower.query_module"},
}
"""Kind of part, or gin name of one part, -> option -> the published name that fills it in the chosen part."""


def published_options(kind: str, gin_name: str) -> dict[str, str]:
    """Options of a part and the published names that fill them; what one part has goes before what its kind has."""
    return PUBLISHED_OPTIONS.get(gin_name, PUBLISHED_OPTIONS.get(kind, {}))
