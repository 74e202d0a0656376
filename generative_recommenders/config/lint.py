"""Hints, logged once, about settings that are accepted but have no effect, or are likely a slip."""

from __future__ import annotations

from pathlib import Path

import torch
from absl import logging

from generative_recommenders.config.fields import OptionOf, Unless, UsedBy
from generative_recommenders.config.published import PUBLISHED
from generative_recommenders.config.published_runs import unlike_published
from generative_recommenders.config.registry import NEGATIVE_SAMPLERS, REGISTRIES, Registry, parts_by_gin_name
from generative_recommenders.config.schema import FIELDS, GROUPS, NAMES, RunSettings
from generative_recommenders.config.sections import MAX_PREFETCH

BFLOAT16 = (
    "train_fn.main_module_bf16",
    "train_fn.eval_bf16",
    "get_similarity_function.bf16_training",
    "create_mol_interaction_module.bf16_training",
)


def log_notices(settings: RunSettings) -> None:
    """Logs, in a line each, which settings are accepted but have no effect here, or are likely a slip."""
    for line in [*settings_without_effect(settings), *likely_slips(settings), *unlike_published(settings)]:
        logging.info("%s", line)


def likely_slips(settings: RunSettings) -> list[str]:
    """One line for each combination that trains as asked but that no published configuration has."""
    dqk, dv = settings.value("hstu_encoder.dqk"), settings.value("hstu_encoder.dv")
    lines = []
    if settings.encoder_name == "HSTU" and dqk != dv:
        lines.append(
            f"hstu_encoder.dqk = {dqk} and hstu_encoder.dv = {dv} do not match: queries and keys are {dqk} wide, "
            f"values {dv}; every published configuration has them equal"
        )
    if settings.uses_item_tower and not settings.draws_negatives:
        lines.append(
            f"train_fn.loss_module = {settings.loss.loss_module!r} scores the catalogue: every item passes through the "
            "item tower in every step; with sampled negatives only those that the step touches do"
        )
    return lines


def settings_without_effect(settings: RunSettings) -> list[str]:
    """One line for each reason why accepted names have no effect here, of those whose value is not the default. Options
    that published MoL runs ignored are logged by MoL itself.
    """
    default, idle = RunSettings(), dict[str, list[str]]()
    for name in NAMES:
        if settings.value(name) != default.value(name) and (why := _reason(settings, name)):
            idle.setdefault(why, []).append(name)
    chosen = settings.chosen_parts()
    others = {owner: part for owner, part in parts_by_gin_name().items() if part not in chosen}
    for owner, given in settings.options.items():
        for name, value in given.items():
            if owner in others and others[owner].checked(name, value) != others[owner].default(name):
                idle.setdefault("this run has no such part", []).append(f"{owner}.{name}")
    lines = [
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: {why}" for why, names in idle.items()
    ]
    if "BruteForce" not in settings.model.top_k_method:
        lines.append(
            f"train_fn.top_k_method = {settings.model.top_k_method!r}: ranks are counted and recommendations found "
            "exactly over the whole catalogue; retrieval.methods.build_top_k alone uses it"
        )
    return [*lines, *_unsupported_here(settings)]


def _reason(settings: RunSettings, name: str) -> str | None:
    """Why a setting has no effect in this run, None where it has."""
    if name not in FIELDS:
        return None if settings.readers(name) else _no_part_uses(settings, PUBLISHED[name][0].registry)
    group, field = FIELDS[name]
    for condition in GROUPS[group].model_fields[field].metadata:
        if isinstance(condition, Unless) and settings.value(condition.setting) in condition.values:
            return f"{condition.setting} is {settings.value(condition.setting)!r}"
        if isinstance(condition, (UsedBy, OptionOf)):
            registry = REGISTRIES[condition.kind]
            parts = [part for part in settings.chosen_parts() if part.registry is registry]
            if isinstance(condition, OptionOf):
                acts = any(field in part.options.model_fields for part in parts)
            else:  # a part's own option of that name is not the setting
                acts = any(condition.name in (None, *part.supplied) for part in parts)
            if not acts:
                return _no_part_uses(settings, registry)
    return None


def _no_part_uses(settings: RunSettings, registry: Registry) -> str:
    """The reason that no chosen part of a kind uses a setting."""
    if registry is NEGATIVE_SAMPLERS and not settings.draws_negatives:
        return f"{settings.loss.loss_module} scores the catalogue and draws no negatives"
    return f"{registry.setting} = {settings.value(registry.setting)!r} has no such option"


def _unsupported_here(settings: RunSettings) -> list[str]:
    loader, lines = settings.loader, []
    if loader.num_workers > 0:
        lines.append(
            f"create_data_loader.num_workers = {loader.num_workers}: one thread makes the batches, without workers"
        )
    if loader.prefetch_factor > MAX_PREFETCH:
        lines.append(
            f"create_data_loader.prefetch_factor = {loader.prefetch_factor}: {MAX_PREFETCH} batches are made ahead"
        )
    asked = list(filter(settings.value, BFLOAT16))
    if asked and not has_bfloat16():
        lines.append(f"{', '.join(asked)}: this machine has no bfloat16 units; it is emulated and slower than float32")
    return lines


def has_bfloat16() -> bool:
    """Whether the accelerator, or the CPU where there is none, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:  # torch's own check is content with AVX-512, which emulates it
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(features)  # x86, x86, ARM
