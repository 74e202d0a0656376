"""Builder of a training task from settings: the model (`build.model`), and its criterion and sampler
(`build.objectives`).

Importing this module registers every built-in part that it builds. Settings may also name an optimizer, a seen filter
or a top-k module: `training.trainer` imports them all, so that any settings can be read.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from absl import logging

from generative_recommenders.build.catalogue import Catalogue
from generative_recommenders.build.model import build_model, build_objective
from generative_recommenders.build.objectives import build_criterion, build_sampler
from generative_recommenders.config.fields import shortened
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.task import TrainingTask

__all__ = [
    "Catalogue",
    "build_criterion",
    "build_model",
    "build_objective",
    "build_sampler",
    "build_task",
]


def build_task(settings: RunSettings, catalogue: Catalogue, collectives: Collectives | None = None) -> TrainingTask:
    """Model, objective, criterion and sampler, on the processes' device."""
    collectives = collectives or Collectives()
    model = build_model(settings, catalogue, collectives).to(collectives.device)
    criterion = build_criterion(settings, catalogue, model).to(collectives.device)
    sampler = build_sampler(settings, catalogue).to(collectives.device) if criterion.needs_negatives else None
    objective = build_objective(settings)
    task = TrainingTask(
        model, objective, criterion, sampler, settings.schedule.random_seed, collectives,
        numbers_rows=settings.schedule.deterministic,
    )  # fmt: skip
    frozen = freeze(task, settings.fine_tuning.freeze)
    if frozen and collectives.is_main:
        every = sum(each.numel() for each in task.parameters())
        logging.info("train_fn.freeze: %d of %d parameters stay as they are", frozen, every)
    return task


def freeze(task: TrainingTask, names: Sequence[str]) -> int:
    """Takes parameters out of training, by their names in the model (``items.table``; those of the loss begin with
    ``criterion.``) or whole beginnings of names. Returns how many numbers are held.

    UserError for a name that none has, and where nothing is left.
    """
    parameters = {name.removeprefix("model."): each for name, each in task.named_parameters()}
    for asked in names:
        prefix = asked.removeprefix("model.")
        found = [each for name, each in parameters.items() if f"{name}.".startswith(f"{prefix}.")]
        if not found:
            beginnings = {".".join(name.split(".")[:end]) for name in parameters for end in range(1, 9)}
            close = difflib.get_close_matches(asked[:200], sorted(beginnings), n=3, cutoff=0.3)
            raise UserError(
                f"train_fn.freeze: no parameter is called {shortened(asked)} or begins so; "
                f"near: {', '.join(close or sorted({name.split('.')[0] for name in parameters}))}"
            )
        for each in found:
            each.requires_grad_(False)
    if not any(each.requires_grad for each in parameters.values()):
        raise UserError("train_fn.freeze leaves nothing to train")
    return sum(each.numel() for each in parameters.values() if not each.requires_grad)
