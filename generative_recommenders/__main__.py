"""One command for all programs: ``next-item train``, or ``python -m generative_recommenders train``."""

from __future__ import annotations

import sys

from generative_recommenders.commands.program import COMMAND, imported
from generative_recommenders.config.fields import nearest

PROGRAMS = {
    "prepare": ("commands.preprocess", "raw ratings to a prepared data set"),
    "train": ("commands.main", "train a model; --resume continues a run"),
    "evaluate": ("commands.main", "score the best checkpoint of a run"),
    "predict": ("commands.main", "recommendations of a run for all users"),
    "export": ("commands.main", "a run's model for other programs"),
    "ablate": ("ablate", "many runs from one file, in one table"),
    "reproduce": ("reproduce", "published tables beside measured ones"),
    "report": ("report", "the page of a run, or a comparison of several"),
    "serve": ("serve", "answers of a run over HTTP"),
    "doctor": ("commands.doctor", "what this machine offers, and a short self-test"),
}
"""Sub-command -> module below the package, and what it does. Modules of absl's flags have ``start``, others
``main``."""


def main() -> int:
    """Runs a sub-command; help and exit code 0 without one."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = [f"  {each:<11}{what}" for each, (_, what) in PROGRAMS.items()]
        print(f"{COMMAND} COMMAND [--help]\n", *lines, sep="\n")
        return 0
    if name not in PROGRAMS:
        print(f"error: there is no {COMMAND} {name}{nearest(name, PROGRAMS)}", file=sys.stderr)
        return 2
    module = imported(PROGRAMS[name][0])
    if name in ("evaluate", "predict", "export"):
        arguments = [f"--mode={name}", *arguments]
    if hasattr(module, "start"):
        sys.argv = [f"{COMMAND} {name}", *arguments]
        module.start()
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
