"""Shared command-line helpers: grouped help, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from absl import app, flags, logging

from generative_recommenders.distributed.memory import out_of_memory
from generative_recommenders.distributed.signals import INTERRUPTED, interrupts
from generative_recommenders.errors import UserError, fault_of
from generative_recommenders.run.logging import redirect_to_devnull, set_up_logging

COMMAND = "next-item"
"""The console script; its sub-commands are in `generative_recommenders.__main__`."""
ASKS_FOR_HELP = {"-h", "-help", "--help", "-?", "--helpshort"}
WIDTH = 100


@dataclass(frozen=True)
class Help:
    """A program's help. examples: arguments and what they do; groups: title and names of flags; subcommand: of
    `COMMAND`."""

    script: str
    subcommand: str
    summary: str
    examples: Sequence[tuple[str, str]]
    groups: Sequence[tuple[str, str]]

    def text(self) -> str:
        by_script = Path(sys.argv[0]).name == self.script
        program = f"python {self.script}" if by_script else f"{COMMAND} {self.subcommand}"
        lines = [self.summary, "", "Examples:"]
        for arguments, what in self.examples:
            lines.append(f"  {program} {arguments}".rstrip())
            lines.append(f"      {what}")
        wrap = partial(textwrap.wrap, width=WIDTH, subsequent_indent=" " * 6)
        for title, names in self.groups:
            lines += ["", f"{title}:"]
            for flag in (flags.FLAGS[name] for name in names.split()):
                kind, choices = flag.flag_type(), getattr(flag.parser, "enum_values", None)
                value = f"{flag.name}={'|'.join(choices) if choices else 'VALUE'}"
                form = f"  --[no]{flag.name}" if kind == "bool" else f"  --{value}"
                lines += wrap(form, break_on_hyphens=False)
                # absl adds the kind before its text, and after it that a flag may be repeated
                text = re.sub(r"^<[^>]*>: |;\s+repeat this option.*", "", flag.help or "", flags=re.DOTALL)
                if kind.startswith("multi"):
                    text += " (repeatable)"
                elif flag.default not in (None, False, []):
                    text += f" (default {flag.default_as_str})"
                lines += wrap(text, initial_indent=" " * 6)
        return "\n".join([*lines, "", f"--verbosity=1 logs more, and {program} --helpfull names every flag."])


def start_program(run: Callable[[list[str]], int], help: Help) -> None:
    """Parses the flags, runs the program and ends the process with its exit code; help goes to stdout, with exit code
    0."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.INFO)

    def main(argv: list[str]) -> None:
        set_up_logging(level=logging.get_verbosity())
        sys.exit(exit_code(lambda: run(argv[1:])))

    app.run(main, flags_parser=partial(parse_flags, help=help))


def parse_flags(argv: list[str], help: Help) -> list[str]:
    """Parses flags, returns the other arguments; one line and exit code 2 for what a flag does not take."""
    open_standard_streams()
    if ASKS_FOR_HELP & set(argv[1:]):
        with contextlib.suppress(BrokenPipeError):
            print(help.text(), flush=True)
        sys.exit(0)
    try:
        for each in argv:
            if each != each.encode(errors="replace").decode():
                raise UserError(f"{each!r} is not UTF-8 text; rename the file or folder")
        rest: list[str] = flags.FLAGS(argv)
        for name in flags.FLAGS:
            if flags.FLAGS[name].present and flags.FLAGS[name].value == "":
                raise UserError(f"--{name}= is empty: give it a value or leave it out")
        return rest
    except (flags.Error, UserError) as error:
        print(f"error: {UserError(error)}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def imported(name: str) -> ModuleType:
    """A module of the package. Imports may take seconds: where they are interrupted, the program ends with one line."""
    modules = []

    def load() -> int:
        modules.append(import_module(f"generative_recommenders.{name}"))
        return 0

    if code := exit_code(load):
        sys.exit(code)
    return modules[0]


def open_standard_streams() -> None:
    """Has what the caller closed lead nowhere: the next file that is opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115, for good


def exit_code(program: Callable[[], int]) -> int:
    """Exit code of ``program``; that of a fault of the input or the system, which is printed in one line."""
    open_standard_streams()
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
            redirect_to_devnull(stream)
    return code
