"""Hints, logged once, about settings that are accepted but have no effect, or are likely a slip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from absl import logging

from generative_recommenders.config.registry import INPUT_PREPROCESSORS, LOSSES, parts_by_gin_name
from generative_recommenders.config.schema import FIELDS, RunSettings
from generative_recommenders.config.sections import MAX_PREFETCH


def _samples(settings: RunSettings) -> bool:
    name = settings.loss.loss_module
    return name in LOSSES and getattr(LOSSES[name].make, "needs_negatives", False)


def _draws(settings: RunSettings, *strategies: str) -> bool:
    return _samples(settings) and settings.negatives.sampling_strategy in strategies


def _reads_ratings(settings: RunSettings) -> bool:
    name = settings.model.input_preprocessor
    return name in INPUT_PREPROCESSORS and getattr(INPUT_PREPROCESSORS[name].make, "needs_ratings", False)


Acts = Callable[[RunSettings], Any]

TRAIN_SETTINGS: tuple[tuple[tuple[str, ...], Acts, str], ...] = (
    (
        ("sampling_strategy", "num_negatives", "negatives_sharing", "log_q_correction", "calibration"),
        _samples,
        "{loss_module} scores the catalogue and draws no negatives",
    ),
    (("loss_activation_checkpoint",), _samples, "{loss_module} keeps no scores for its backward pass anyway"),
    (
        ("negatives_block_size",),
        lambda s: _samples(s) and s.negatives.negatives_sharing == "block",
        "negatives are not shared by blocks",
    ),
    (
        ("class_feature", "class_selector"),
        lambda s: _draws(s, "multi-class"),
        "no negatives are drawn by class",
    ),
    (("mixed_shares",), lambda s: _draws(s, "mixed"), "sampling_strategy is not mixed"),
    (
        ("popularity_power",),
        lambda s: _draws(s, "popularity", "mixed"),
        "no negatives are drawn by popularity",
    ),
    (
        ("calibration",),
        lambda s: not _samples(s) or s.loss.loss_module == "gBCE",
        "{loss_module} has none",
    ),
    (
        ("mask_probability",),
        lambda s: s.loss.objective in ("masked", "permuted", "replaced"),
        "objective {objective} hides nothing",
    ),
    (
        ("max_span_length", "permute_all"),
        lambda s: s.loss.objective == "permuted",
        "objective is not permuted",
    ),
    (
        ("fakes_from", "tie_discriminator", "discriminator_weight"),
        lambda s: s.loss.objective == "replaced",
        "objective is not replaced",
    ),
    (
        ("category_feature",),
        lambda s: s.items.embedding_module_type == "categorical",
        "embeddings are not by category",
    ),
    (("next_time",), lambda s: s.uses_times, "no bias by time reads it"),
    (
        ("rating_embedding_dim", "num_ratings"),
        _reads_ratings,
        "{input_preprocessor} reads no ratings",
    ),
    (
        ("partial_eval_num_iters",),
        lambda s: s.evaluation.full_eval_every_n > 1,
        "every evaluation is a full one",
    ),
)
"""(fields of ``train_fn``, when they act, why they do not)."""


def log_notices(settings: RunSettings) -> None:
    """Says once, in a line each, what is accepted but cannot act here, or is likely a slip."""
    for line in [*inert(settings), *likely_slips(settings)]:
        logging.info("%s", line)


def likely_slips(settings: RunSettings) -> list[str]:
    """One line for each combination that trains as asked but that no published configuration has."""
    dqk, dv = settings.option("hstu_encoder.dqk"), settings.option("hstu_encoder.dv")
    lines = []
    if settings.encoder_name == "HSTU" and dqk != dv:
        lines.append(
            f"hstu_encoder.dqk = {dqk} and hstu_encoder.dv = {dv} do not match: queries and keys are {dqk} wide, values "
            f"{dv}; every published configuration has them equal"
        )
    if settings.uses_item_tower and not _samples(settings):
        lines.append(
            f"train_fn.loss_module = {settings.loss.loss_module!r} scores the catalogue: every item passes through the "
            "item tower in every step; with sampled negatives only those that the step touches do"
        )
    return lines


def inert(settings: RunSettings) -> list[str]:
    """One line for each accepted name that cannot act here. (MoL says itself what published runs ignored.)"""
    return [*_idle_train_settings(settings), *_idle_sections(settings), *_beyond_this_machine(settings)]


def _idle_train_settings(settings: RunSettings) -> list[str]:
    lines, default = [], RunSettings()
    values = {name: settings.published(name) for name in FIELDS if name.startswith("train_fn.")}
    changed = {name.removeprefix("train_fn.") for name in values if values[name] != default.published(name)}
    by_field = {name.removeprefix("train_fn."): value for name, value in values.items()}
    said = set[str]()
    for names, acts, why in TRAIN_SETTINGS:
        idle = [name for name in names if name in changed - said]
        if idle and not acts(settings):
            said |= set(idle)
            reason = why.format(**by_field)
            lines.append(f"{', '.join(f'train_fn.{name}' for name in idle)} cannot act: {reason}")
    if "BruteForce" not in settings.model.top_k_method:
        lines.append(
            f"train_fn.top_k_method = {settings.model.top_k_method!r}: ranks are counted exactly over the whole "
            "catalogue; it acts in retrieval.methods.build_top_k alone"
        )
    return lines


def _idle_sections(settings: RunSettings) -> list[str]:
    """Options of parts that the run does not have, where they are not the defaults."""
    lines, parts = [], parts_by_gin_name()
    chosen = {registry[name].gin_name for registry, name in settings.chosen_parts() if name in registry}
    for owner, given in settings.options.items():
        if owner in chosen or owner not in parts:
            continue
        options = parts[owner].options.model_fields
        values = parts[owner].option_values(given)
        idle = [
            name for name in given if values[name] != options[name].get_default(call_default_factory=True)
        ]
        if idle:
            lines.append(
                f"{', '.join(f'{owner}.{name}' for name in idle)} cannot act: this run has no such part"
            )
    if settings.queries.query_module not in ("SASRec", settings.encoder_name):
        lines.append("item_tower.query_module cannot act: this run has no such part")
    if settings.similarity.bf16_training and settings.model.interaction_module_type != "MoL":
        lines.append("get_similarity_function.bf16_training: it acts on MoL; dot products stay float32")
    if settings.similarity.activation_checkpoint and settings.model.interaction_module_type != "MoL":
        lines.append(
            "get_similarity_function.activation_checkpoint: it acts on MoL; dot products keep nothing"
        )
    return lines


def _beyond_this_machine(settings: RunSettings) -> list[str]:
    loader, lines = settings.loader, []
    if loader.num_workers > 0:
        lines.append(
            f"create_data_loader.num_workers = {loader.num_workers}: batches are cut by one thread and need no workers"
        )
    if loader.prefetch_factor > MAX_PREFETCH:
        lines.append(
            f"create_data_loader.prefetch_factor = {loader.prefetch_factor}: {MAX_PREFETCH} batches are made ahead"
        )
    bf16 = {
        "train_fn.main_module_bf16": settings.model.main_module_bf16,
        "train_fn.eval_bf16": settings.evaluation.eval_bf16,
        "get_similarity_function.bf16_training": settings.similarity.bf16_training,
        "create_mol_interaction_module.bf16_training": settings.option(
            "create_mol_interaction_module.bf16_training"
        ),
    }
    if any(bf16.values()) and not has_bfloat16():
        names = ", ".join(name for name, asked in bf16.items() if asked)
        lines.append(f"{names}: this machine has no bfloat16 units; it is emulated and slower than float32")
    return lines


def has_bfloat16() -> bool:
    """Whether the accelerator, or the CPU where there is none, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
