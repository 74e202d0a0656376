"""Reproduction of published tables: ``python -m generative_recommenders.reproduce ml-1m [--table=hstu] [--jobs=N]``.

Prepares the data or takes what is prepared, runs what configs/reproduce/NAME/*.gin ask for, and writes
docs/results/NAME.md with published beside measured figures. Each run's JSON file is written as soon as it is done.
Started again, finished runs are left alone and interrupted ones resume; ``--report_only`` makes the page from the JSON
files alone.
"""

from __future__ import annotations

import sys

from generative_recommenders.commands.program import exit_code
from generative_recommenders.run.logging import set_up_logging


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        # Imports that take seconds, here, where an interrupt of them is one line.
        from generative_recommenders.commands.reproduction.program import run

        return run(argv)

    set_up_logging()
    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
