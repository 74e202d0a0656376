import contextlib
import io
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from absl import logging
from torch import nn

from generative_recommenders.run.epoch_log import SHOWN, EpochLog
from generative_recommenders.training.callbacks import Recorder
from generative_recommenders.training.progress import (
    DivergenceMonitor,
    NonFiniteError,
    PlateauMonitor,
    RemainingTime,
    check_finite,
    duration,
    first_non_finite_module,
    with_progress,
)


class Clock:
    """Every item takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds

    def items(self, count: int):
        for item in range(count):
            yield item
            self.now += self.seconds

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_with_the_remaining_time():
    clock, stream = Clock(2.0), io.StringIO()
    steps = with_progress(clock.items(90), 100, "epoch 3", 10, stream=stream, line_seconds=60, clock=clock)
    assert list(steps) == list(range(90))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("epoch 3: 41/100")
    assert 1 <= len(lines) <= 3
    for line in lines:
        done = int(line.split("/")[0].split()[-1])
        seconds = line.split(", ")[2].removesuffix(" left").split(":")
        assert abs(int(seconds[0]) * 60 + int(seconds[1]) - 2 * (100 - done)) <= 6


def test_the_remaining_time_of_a_run_counts_all_that_it_does():
    clock = Clock(2.0)
    remaining = RemainingTime(100, 10, clock)
    for _ in clock.items(20):
        pass
    clock.now += 5  # an evaluation
    assert remaining.left(30) == pytest.approx(70 * 45 / 20)
    assert remaining.left(100) == 0.0


def test_the_line_of_an_epoch_says_how_long_the_run_takes(caplog):
    run = SimpleNamespace(write_scalars=lambda *_: None, write_metrics=lambda *_: None)
    record = {"epoch": 0, "train_loss": 1.0, "seconds": 60.0, "full": True, **dict.fromkeys(SHOWN, 0.1)}
    level = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        EpochLog(run, 9, "validation").epoch(7, record, 5025.0)
    finally:
        logging.set_verbosity(level)
    assert "60 s, 1:23:45 left" in caplog.text


def test_a_bar_on_a_terminal():
    stream = Terminal()
    assert list(with_progress([7, 8], 4, "epoch 1", 2, stream=stream)) == [7, 8]
    assert "epoch 1" in stream.getvalue() and "2/4" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_processes_are_silent(stream):
    clock = Clock(100.0)
    steps = with_progress(clock.items(5), 5, "epoch", enabled=False, stream=stream, clock=clock)
    assert list(steps) == [0, 1, 2, 3, 4]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_plateau_is_logged_once():
    monitor = PlateauMonitor(patience=3, min_change=0.01)
    warnings = [monitor.observe(loss) for loss in (5.0, 4.0, 3.99, 3.98, 3.97, 3.97, 3.97)]
    assert [warning is not None for warning in warnings] == [False] * 4 + [True, False, False]
    assert "4" in warnings[4] and "plateau" in warnings[4]
    assert monitor.observe(3.0) is None
    assert [monitor.observe(3.0) is not None for _ in range(3)] == [False, False, True]


def test_a_falling_loss_is_no_plateau():
    monitor = PlateauMonitor(patience=2, min_change=0.01)
    assert all(monitor.observe(10 * 0.98**step) is None for step in range(200))


def test_divergence_is_logged_once_until_it_is_over():
    monitor = DivergenceMonitor(factor=2.0, smoothing=0.5)
    losses = [4.0, 2.0, 1.0, 1.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]
    warned = [monitor.observe(loss) is not None for loss in losses]
    assert warned == [False] * 4 + [True] + [False] * 6 + [True]


def test_warnings_survive_a_resumed_run():
    """A log restored from JSON at any moment says the same as one that was never interrupted."""
    losses = [4.0, 2.0, 1.0, 1.0, *[30.0] * 8, *[1.0] * 40]
    for stop in range(len(losses)):
        whole, first, second = (Recorder() for _ in range(3))
        expected = [(whole.divergence.observe(x), whole.plateau.observe(x)) for x in losses]
        said = [(first.divergence.observe(x), first.plateau.observe(x)) for x in losses[:stop]]
        second.restore(json.loads(json.dumps(first.state())))
        said += [(second.divergence.observe(x), second.plateau.observe(x)) for x in losses[stop:]]
        assert said == expected
    assert [any(column) for column in zip(*expected)] == [True, True]


def test_one_hard_batch_is_no_divergence():
    monitor = DivergenceMonitor()
    assert all(monitor.observe(9.0 if step == 50 else 1.0) is None for step in range(100))


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
