"""Log lines: once (from the main process), with levels, on the screen and in the run folder."""

from __future__ import annotations

import contextlib
import io
import logging as python_logging
import os
from pathlib import Path

from absl import logging


def set_log_level(is_main: bool, level: int = logging.INFO) -> None:
    """The main process logs from ``level`` on (absl's numbers); the others only say what went wrong."""
    logging.use_absl_handler()
    logging.set_verbosity(level if is_main else logging.ERROR)


def add_log_file(path: Path) -> python_logging.Handler:
    """Sends log lines to the file too, which is added to; returns the handler for `remove_log_file`. A link
    is not followed: OSError."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.get_absl_logger().addHandler(handler)
    return handler


def remove_log_file(handler: python_logging.Handler) -> None:
    logging.get_absl_logger().removeHandler(handler)
    with contextlib.suppress(OSError):
        handler.close()


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that follows no symbolic link to a file elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class _LogFile(python_logging.FileHandler):
    """A full disk costs lines of the file, which are on the screen too, and not the run."""

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=no_link)

    def handleError(self, record: python_logging.LogRecord) -> None:
        """Says nothing: the next checkpoint or metric will."""
