"""Log lines of a program: one format, once (from the main process), on the screen and in the run's train.log.

Every module logs with ``from absl import logging``. The handlers sit at Python's root logger, so that lines of other
libraries, and warnings, go the same two ways.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging as python_logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from absl import flags, logging

FORMATTER = python_logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _LogFile(python_logging.FileHandler):
    """A full disk costs lines of the file, which are on the screen too, and not the run."""

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=no_link)

    def handleError(self, record: python_logging.LogRecord) -> None:
        """Nothing is logged here: the next checkpoint or metric reports the disk."""


class _EarlyLines(python_logging.Handler):
    """Keeps the lines from before the run has a folder, for its log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: collections.deque[python_logging.LogRecord] = collections.deque(maxlen=1000)

    def emit(self, record: python_logging.LogRecord) -> None:
        self.records.append(record)


_early_lines = _EarlyLines()


def set_up_logging(is_main: bool = True, level: int = logging.INFO) -> None:
    """The main process logs from ``level`` on (absl's numbers); the others log errors alone."""
    # A program without absl's flags, as a notebook, has parsed none, and absl would warn of that.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(FORMATTER)
    logging.set_verbosity(level if is_main else logging.ERROR)
    warnings.formatwarning = _one_line
    python_logging.captureWarnings(True)
    # Torch sets a level at the end of its import, and tells of its caches where the program ends before that.
    if not (of_torch := python_logging.getLogger("torch")).level:
        of_torch.setLevel(python_logging.WARNING)
    root = python_logging.getLogger()
    if not any(isinstance(handler, (_LogFile, _EarlyLines)) for handler in root.handlers):
        _early_lines.records.clear()
        root.addHandler(_early_lines)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"


def add_log_file(path: Path) -> python_logging.Handler:
    """Appends log lines to the file too, those since `set_up_logging` first; returns the handler for `remove_log_file`.
    A link is not followed: OSError."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(FORMATTER)
    root = python_logging.getLogger()
    root.removeHandler(_early_lines)
    for record in _early_lines.records:
        handler.handle(record)
    _early_lines.records.clear()
    root.addHandler(handler)
    return handler


def remove_log_file(handler: python_logging.Handler) -> None:
    python_logging.getLogger().removeHandler(handler)
    with contextlib.suppress(OSError):
        handler.close()


def show(text: str) -> None:
    """Prints results on stdout, and keeps them in the log file of an open run.

    A reader that has seen enough, such as ``head``, stops neither the work nor its exit code.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        redirect_to_devnull(sys.stdout)
    to_log_file(python_logging.INFO, text.strip())


def redirect_to_devnull(stream: TextIO) -> None:
    """Discards what is written to the stream from now on."""
    with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere.fileno(), stream.fileno())


def to_log_file(level: int, text: str) -> None:
    """Writes what the screen shows otherwise, as the line of an error, to the log file of an open run alone."""
    record = python_logging.LogRecord("absl", level, __file__, 0, text, None, None)
    for handler in python_logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            handler.handle(record)


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that follows no symbolic link to a file elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
