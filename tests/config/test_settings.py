"""Every setting under extreme values: settings, or one line that names it; never more."""

from __future__ import annotations

import json
import math
import resource
from functools import partial
from typing import Any

import pytest

import generative_recommenders.build.parts  # noqa: F401  (registers the built-in parts)
from generative_recommenders.config.gin import load_settings, override
from generative_recommenders.config.registry import parts_by_gin_name
from generative_recommenders.config.schema import NAMES, RunSettings
from generative_recommenders.errors import UserError

EXTREME: list[Any] = [
    2**63 - 1, 2**63, -(2**63), 10**5000, -1, 0, 1e39, -1e39, 1e-308, math.nan, math.inf, -math.inf, "x", "",
    "x" * 10**5,
    True, False, [], [2**63 - 1], [None], [[1]], {}, {"x": 1e39}, {"x": math.nan}, {"x": []}, {1: 1}, None, 0.5, 1.0,
    b"x",
]  # fmt: skip
REFUSED_ALWAYS = (2**63, -(2**63), 10**5000, 1e39, -1e39, 1e-308, math.inf, -math.inf, b"x")


OPTIONS = {
    f"{gin_name}.{option}": part
    for gin_name, part in parts_by_gin_name().items()
    for option in part.options.model_fields
}


@pytest.mark.parametrize("name", [*NAMES, *OPTIONS])
def test_extreme_values_give_settings_or_one_line_error(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in EXTREME:
        try:
            settings = RunSettings().bind({name: value})
        except UserError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 400
            assert name.rpartition(".")[2] in text
        else:
            assert not any(value is each for each in REFUSED_ALWAYS)
            assert RunSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


@pytest.mark.parametrize("text", ["9223372036854775807", "9223372036854775808", "1e39", "1e-308", "1e999", "None"])
def test_extreme_values_by_gin_json_and_override_agree(text: str) -> None:
    for name in NAMES:
        owner, _, field = name.partition(".")
        value = float("inf") if text == "1e999" else eval(text)
        binding = f"{name} = {text}"
        makers = (
            partial(load_settings, [], [binding]),
            partial(override, RunSettings(), [binding]),
            partial(RunSettings.from_json, {owner: {field: value}}),
        )
        results = []
        for make in makers:
            try:
                results.append(make())
            except UserError as error:
                results.append(str(error))
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("weight_decay", 0, 0.0),
        ("event_features", ["shelf"], ("shelf",)),
        ("loss_weights", {"mi_loss": 1}, {"mi_loss": 1.0}),
        ("max_grad_norm", None, None),
    ],
)
def test_ints_are_floats_and_lists_are_tuples(name: str, value: object, kept: object) -> None:
    assert RunSettings().bind({f"train_fn.{name}": value}).value(f"train_fn.{name}") == kept


def test_settings_are_frozen_and_changed_by_copies() -> None:
    schedule = RunSettings().schedule
    with pytest.raises(ValueError, match="frozen"):
        schedule.num_epochs = 3  # type: ignore[misc]
    assert (schedule.changed(num_epochs=3).num_epochs, schedule.num_epochs) == (3, 101)
    with pytest.raises(UserError, match="train_fn.num_epochs must be 0 or more, got -1"):
        schedule.changed(num_epochs=-1)
    with pytest.raises(UserError, match="train_fn has no parameter 'num_epoch'; did you mean 'num_epochs'"):
        schedule.changed(num_epoch=3)
    with pytest.raises(UserError, match="no setting 'train_fn.num_epoch'; did you mean 'train_fn.num_epochs'"):
        RunSettings().bind({"train_fn.num_epoch": 3})
