"""Warnings of a run: plateaus and divergence, told once, also by a resumed run."""

from __future__ import annotations

import json

from generative_recommenders.training.callbacks import DivergenceMonitor, PlateauMonitor, Recorder


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
