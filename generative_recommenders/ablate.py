"""Ablations:
``python -m generative_recommenders.ablate FILE.gin [--seeds=3] [--jobs=N] [--search=optuna --trials=40]``.

The gin file holds a base configuration and, as ``ablation.cells``, ``ablation.grid`` or ``ablation.search``, what is
varied. Each cell is a run of main.py for each seed. Started again, finished runs are left alone and interrupted ones
resume.
"""

from __future__ import annotations

import sys

from generative_recommenders.commands.program import exit_code
from generative_recommenders.run.logging import set_up_logging


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        # Imports that take seconds, here, where an interrupt of them is one line.
        from generative_recommenders.commands.ablation.program import run

        return run(argv)

    set_up_logging()
    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
