"""Debugging aids of a run: the origin of a loss that is not finite, and a profiler's trace of a few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from absl import logging

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError
from generative_recommenders.ops.embedding import all_finite

WAIT, WARMUP, ACTIVE = 3, 2, 5


class NonFiniteError(UserError):
    """A loss that is not a finite number; one line with the step and where it began."""

    exit_code = 3


def check_finite(
    loss: float,
    step: int,
    model: torch.nn.Module,
    rerun: Callable[[], object],
    collectives: Collectives | None = None,
) -> None:
    """Raises NonFiniteError for a NaN or infinite loss, on all processes with the same line.

    loss: of all processes, each of which runs its own part of the step again. rerun: computes the step's forward pass
    again.
    """
    if math.isfinite(loss):
        return
    collectives = collectives or Collectives()
    origin = "the outputs of all modules are finite, so it began in the loss"
    parameter = _non_finite_parameter(model)
    own = parameter, None if parameter else first_non_finite_module(model, rerun)
    for rank, (parameter, module) in enumerate(collectives.gather_object_json(own)):
        if parameter or module:
            where = f" on rank {rank}" if collectives.world_size > 1 else ""
            origin = f"the first output that is not finite is that of {module}{where}"
            if parameter:
                origin = f"the parameter {parameter} is not finite: the update before was too large"
            break
    raise NonFiniteError(f"the loss is {loss} at step {step}: {origin}; check the data for NaN, or lower learning_rate")


def check_finite_parameters(step: int, model: torch.nn.Module) -> None:
    """Raises NonFiniteError for weights that hold NaN or an infinity, before they are scored or saved."""
    parameter = _non_finite_parameter(model)
    if parameter is not None:
        raise NonFiniteError(
            f"the parameter {parameter} is not finite after step {step}: the update was too large; lower learning_rate"
        )


def _non_finite_parameter(model: torch.nn.Module) -> str | None:
    return next((name for name, value in model.named_parameters() if not all_finite(value)), None)


def first_non_finite_module(model: torch.nn.Module, rerun: Callable[[], object]) -> str | None:
    """Name of the first module, in the order of completion, whose output holds NaN or +inf; None where
    none does.

    -inf does not count: scores are masked with it. rerun: runs the model's forward pass.
    """
    found: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        values = (each for each in _tensors(output) if each.is_floating_point())
        if not found and not all(bool((each < math.inf).all()) for each in values):
            found.append(names[module])

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors in a module's output: itself, or inside of sequences, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@contextlib.contextmanager
def step_profiler(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step; with a folder, steps 6 to 10 go to ``profile.json`` (a Chrome trace)
    in it."""
    if folder is None:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        steps = min(ACTIVE, profiler.step_num - WAIT - WARMUP)  # fewer where training ends before
        if steps <= 0:
            return
        profiler.export_chrome_trace(str(folder / "profile.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        logging.info("profile of %d steps in %s\n%s", steps, folder / "profile.json", table)

    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
    if profiler.step_num <= WAIT + WARMUP:
        logging.warning("--profile: no trace of %d steps, it needs %d", profiler.step_num, WAIT + WARMUP + 1)
