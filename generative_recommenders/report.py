"""Report of a trained run, or of several beside each other:
``python -m generative_recommenders.report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from generative_recommenders.commands.program import exit_code
from generative_recommenders.config.plugins import add_plugin_flag, load_plugins
from generative_recommenders.run.logging import set_up_logging, show


def main(argv: list[str] | None = None) -> int:
    """Writes the page of one run; of several a comparison with paired tests of significance."""
    parser = argparse.ArgumentParser(
        prog="python -m generative_recommenders.report",
        description="Writes the page of a run again, or one page that compares several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a trained run")
    parser.add_argument(
        "--output", type=Path, help="the page; RUN/report.html, or comparison.html of several, by default"
    )
    add_plugin_flag(parser)
    args = parser.parse_args(argv)

    def write() -> int:
        # Imports that take seconds, here, where an interrupt of them is one line.
        from generative_recommenders.run.report.page import write_comparison, write_report

        load_plugins(args.plugin)
        paths = [Path(run) for run in args.runs]
        if len(paths) == 1:
            page = write_report(paths[0], args.output)
        else:
            page = write_comparison(paths, args.output or Path("comparison.html"))
        show(str(page))
        return 0

    set_up_logging()
    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
