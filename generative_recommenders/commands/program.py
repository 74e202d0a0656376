"""What the two programs share: faults of flags, of the input and of the system as one line, with an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from absl import flags, logging

from generative_recommenders.distributed.memory import out_of_memory
from generative_recommenders.distributed.signals import INTERRUPTED, interrupts
from generative_recommenders.errors import UserError, fault_of
from generative_recommenders.run.logging import to_nowhere


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, returns the other arguments; one line and exit code 2 for what a flag does not take."""
    _open_standard_streams()
    try:
        odd = next((each for each in argv if not _is_utf8(each)), None)
        if odd is not None:
            raise UserError(f"{odd!r} is not UTF-8 text; rename the file or folder")
        rest: list[str] = flags.FLAGS(argv)
        for name in flags.FLAGS:
            if flags.FLAGS[name].present and flags.FLAGS[name].value == "":
                raise UserError(f"--{name}= is empty: give it a value or leave it out")
        return rest
    except (flags.Error, UserError) as error:
        print(f"error: {UserError(error)}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def exit_code(program: Callable[[], int]) -> int:
    """What ``program`` returns; the code of a fault of the input or the system, which is told in one line."""
    line = ""
    try:
        with interrupts():
            code = program()
    except KeyboardInterrupt:  # where no run has begun: one that has writes a checkpoint
        line, code = "interrupted", INTERRUPTED
    except Exception as error:
        fault, memory = fault_of(error), out_of_memory(error)
        if fault is None and memory is None:
            raise
        logging.debug("the fault came from here", exc_info=True)
        line, code = memory or str(fault), 1 if fault is None else fault.exit_code
    if line:
        with contextlib.suppress(OSError):
            print(f"error: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # what is left to write must not fail at the interpreter's end
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)
    return code


def _open_standard_streams() -> None:
    """Streams that the caller closed lead nowhere; otherwise the next file opened would take the number of one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115, for good


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()
