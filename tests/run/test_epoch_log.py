"""The log line of an epoch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from absl import logging

from generative_recommenders.run import epoch_log
from generative_recommenders.run.epoch_log import EpochLog
from generative_recommenders.run.summary import COLUMNS


@pytest.mark.parametrize("first_step", [10, 14])
def test_the_line_of_an_epoch_says_how_long_the_run_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, first_step: int
) -> None:
    """At the speed of all that the run did since it began, evaluations included; steps of before count only where it
    was resumed in an evaluation."""
    run = SimpleNamespace(write_scalars=lambda *_: None, write_metrics=lambda *_: None)
    record = {"epoch": 0, "train_loss": 1.0, "seconds": 703.5, "full": True, **dict.fromkeys(COLUMNS, 0.1)}
    clock = iter([1000.0, 1000.0 + 201.0])
    monkeypatch.setattr(epoch_log, "perf_counter", lambda: next(clock))
    level = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        log = EpochLog(run, 9, "validation")
        log.begin(first_step, 10 + 4 + 100)
        log.epoch(10 + 4, record)
    finally:
        logging.set_verbosity(level)
    assert "704 s, 1:23:45 left" in caplog.text
