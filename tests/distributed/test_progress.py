"""Progress bars: on a terminal and in a file, with the remaining time, of the main process alone."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator

import pytest

from generative_recommenders.distributed import progress
from generative_recommenders.distributed.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def slowly(count: int) -> Iterator[int]:
    for item in range(count):
        time.sleep(0.02)
        yield item


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, **options: bool) -> str:
    """What stands on standard error after a resumed epoch of 5 items, 2 of which were done before."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress_bar(slowly(3), 5, "epoch 1/3", 2, **options)) == [0, 1, 2]
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_done_and_remaining_time(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "TERMINAL_SECONDS" if terminal else "LOG_SECONDS", 0.0)
    text = shown(monkeypatch, terminal)
    assert "epoch 1/3:  60%" in text and "3/5 [00:00<00:0" in text
    assert "2/5" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_short_work_shows_none(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    assert shown(monkeypatch, terminal) == ""


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.0)
    assert shown(monkeypatch, True, shown=False) == ""
