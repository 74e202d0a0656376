"""Report of a trained run, or of several beside each other: ``python -m generative_recommenders.report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import generative_recommenders.build.registered  # noqa: F401  the parts that settings name
from generative_recommenders.commands.program import exit_code
from generative_recommenders.config.plugins import add_plugin_flag, load_plugins
from generative_recommenders.run.logging import set_up_logging, show
from generative_recommenders.run.report.page import write_comparison, write_report


def main(argv: list[str] | None = None) -> int:
    """Writes RUN/report.html of one run; of several a comparison with paired tests of significance."""
    parser = argparse.ArgumentParser(
        prog="python -m generative_recommenders.report",
        description="Writes RUN/report.html again, or one page that compares several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a trained run")
    parser.add_argument(
        "--output", default="comparison.html", help="the page of several runs, %(default)s by default"
    )
    add_plugin_flag(parser)
    args = parser.parse_args(argv)

    def write() -> int:
        load_plugins(args.plugin)
        paths = [Path(run) for run in args.runs]
        show(str(write_report(paths[0]) if len(paths) == 1 else write_comparison(paths, Path(args.output))))
        return 0

    set_up_logging()
    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
