"""Errors of the user's input and of the system that the program runs on."""

from __future__ import annotations

import os


class UserError(Exception):
    """A fault of the input (data, configuration, checkpoint): one clear line and an exit code, no traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever the names in it hold."""
        line = " ".join(super().__str__().splitlines())
        return line.encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def not_installed(package: str, extra: str) -> UserError:
    """The line for a package that an extra of this one brings."""
    return UserError(
        f"{package} is not installed; the extra {extra!r} has it: pip install '.[{extra}]' in the folder of the program"
    )


def fault_of(error: BaseException) -> UserError | None:
    """The one line of an error that the program's code is not to blame for, or None.

    Beside UserError these are faults of the system (a file that cannot be read or written, too many open files) and
    names that are no UTF-8 text. A lost connection to another process is none: that process says what happened.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, UnicodeEncodeError):
        return UserError(f"{error.object[:200]!r} is not UTF-8 text; rename the file or folder")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        names = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, (str, bytes))]
        return UserError(": ".join([*names, error.strerror or str(error) or type(error).__name__]))
    return None
