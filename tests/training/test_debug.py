"""Origin of a loss that is not finite: the module or the parameter, by name."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.debug import NonFiniteError, check_finite, first_non_finite_module, step_profiler


@dataclass
class Output:
    x: torch.Tensor


class Odd(nn.Module):
    """Gives what it is told, in a dataclass inside of a tuple."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return ({"first": Output(x), "second": torch.full_like(x, self.value)}, None)


class Model(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([Odd(0.0), Odd(value), Odd(math.nan)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)[0]["second"]
        return x


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_module_that_is_not_finite(value):
    model = Model(value)
    assert first_non_finite_module(model, lambda: model(torch.ones(2, 3))) == "blocks.1"


def test_scores_that_are_masked_are_no_fault():
    model = Model(-math.inf)
    assert first_non_finite_module(model, lambda: model(torch.ones(2, 3))) == "blocks.2"


class Hooked(nn.Linear):
    """Counts the hooks it has."""

    hooks = 0

    def register_forward_hook(self, hook):
        handle = super().register_forward_hook(hook)
        self.hooks += 1
        return SimpleNamespace(remove=lambda: (handle.remove(), self.lose_hook()))

    def lose_hook(self) -> None:
        self.hooks -= 1


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays(fails):
    model = Hooked(2, 2)
    seen = []

    def rerun() -> None:
        seen.append(model.hooks)
        if fails:
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        first_non_finite_module(model, rerun)
    assert seen == [1] and model.hooks == 0


def test_all_finite():
    model = nn.Linear(2, 2)
    assert first_non_finite_module(model, lambda: model(torch.ones(2))) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_origin(loss):
    model = Model(math.nan)
    with pytest.raises(NonFiniteError, match=r"at step 7: .* blocks\.1;") as caught:
        check_finite(loss, 7, model, lambda: model(torch.ones(2, 3)))
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_not_finite_is_named():
    model = Model(0.0)
    model.first.bias.data[1] = -math.inf
    with pytest.raises(NonFiniteError, match=r"parameter first\.bias is not finite"):
        check_finite(math.nan, 7, model, lambda: model(torch.ones(2, 3)))


def test_a_finite_loss_runs_nothing_again():
    check_finite(3.0, 7, nn.Linear(2, 2), lambda: pytest.fail("ran again"))


class OfTwo(Collectives):
    """This process and another one, which found a module."""

    world_size = 2

    def gather_object_json(self, value):
        return [value, (None, "blocks.1")]


def test_an_origin_on_another_process_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(NonFiniteError, match=r"is that of blocks\.1 on rank 1;"):
        check_finite(math.nan, 7, model, lambda: model(torch.ones(2)), OfTwo())


@pytest.mark.parametrize(("steps", "traced"), [(4, 0), (5, 0), (8, 3), (10, 5), (12, 5)])
def test_a_profile_says_how_many_steps_it_has_or_why_there_is_none(tmp_path, caplog, steps, traced):
    caplog.set_level("INFO", logger="absl")
    with step_profiler(tmp_path) as on_step:
        for _ in range(steps):
            torch.ones(2).sum()
            on_step()
    assert (tmp_path / "profile.json").exists() == (traced > 0)
    said = f"profile of {traced} steps in" if traced else f"no trace of {steps} steps, it needs 6"
    assert said in caplog.text
    assert ("no trace" in caplog.text) == (traced == 0)
