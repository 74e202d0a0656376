"""Errors of the user's input."""

from __future__ import annotations


class UserError(Exception):
    """A fault of the input (data, configuration, checkpoint): one clear line and an exit code, no traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever the names in it hold."""
        return " ".join(super().__str__().splitlines())
