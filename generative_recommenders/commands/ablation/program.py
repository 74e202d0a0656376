"""What ``python -m generative_recommenders.ablate`` does: flags, runs, tables."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from absl import logging

from generative_recommenders.commands.ablation import jobs
from generative_recommenders.commands.ablation.plan import Ablation, Run, names_in
from generative_recommenders.commands.ablation.records import Finished
from generative_recommenders.commands.ablation.search import Search
from generative_recommenders.commands.ablation.tables import collect, write_tables
from generative_recommenders.config.plugins import add_plugin_flag, load_plugins
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import show

TRIALS = 40
"""Trials of a search where ``--trials`` does not say."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m generative_recommenders.ablate",
        description="Ablations: many runs from one gin file, in one table.",
    )
    made.add_argument("file", help="the ablation's gin file, as configs/ablations/ml-1m-losses.gin")
    made.add_argument(
        "--seeds",
        type=int,
        help="runs of each cell, by the file's seed and those after it; as the file says, or one, by default",
    )
    made.add_argument("--jobs", type=int, help="runs at a time; one a GPU, or one, by default")
    made.add_argument("--only", default="", help="names of the cells to run, with commas between; all by default")
    made.add_argument("--search", choices=["optuna"], help="search the file's space instead of running its cells")
    made.add_argument(
        "--trials",
        type=int,
        help=f"trials of the search, those before this start counted; {TRIALS} by default",
    )
    made.add_argument("--runs", help="folder of all runs and tables; runs/ablations/NAME_OF_FILE by default")
    made.add_argument("--data_root", default="data", help="where raw/ and prepared/ data sets lie")
    made.add_argument("--gin_bindings", action="append", default=[], help="a binding over every cell; repeatable")
    add_plugin_flag(made)
    return made


def run(argv: list[str] | None) -> int:
    """Runs what is missing, writes the tables, prints the Markdown; 1 where a run failed."""
    args = parser().parse_args(argv)
    file = Path(args.file)
    if any(given is not None and given < 1 for given in (args.seeds, args.trials, args.jobs)):
        raise UserError("--seeds, --jobs and --trials must be 1 or more")
    if args.trials is not None and not args.search:
        raise UserError("--trials needs --search=optuna")
    if args.search and ((args.seeds or 1) > 1 or args.only):
        raise UserError("--search runs one seed of every trial: leave out --seeds and --only")
    load_plugins(args.plugin)
    out = Path(args.runs or Path("runs") / "ablations" / file.stem)
    ablation = Ablation.load(file, args.gin_bindings, out)
    search = Search(ablation, args.trials or TRIALS) if args.search else None
    runs = search.runs() if search is not None else iter(_list(ablation, args))
    finished: dict[str, list[Finished]] = {}
    failed: dict[str, str] = {}

    def done(run: Run, failure: str | None) -> None:
        if search is not None:
            search.tell(run, failure)
        if failure is None:
            finished.setdefault(run.cell.name, []).append(Finished.of(run))
            measured = finished[run.cell.name][-1].summary["test"][ablation.settings.metric]
            logging.info("%s is done: test %s %.4f", run.name, ablation.settings.metric.upper(), measured)
        else:
            failed[run.name] = failure
            logging.error("%s failed: %s", run.name, failure)

    flags = [f"--data_root={args.data_root}", *(f"--plugin={each}" for each in args.plugin)]
    jobs.run_all(runs, done, jobs.slots(args.jobs), partial(jobs.next_command, flags=flags))
    if search is not None:
        failed |= search.refused
    by_cell = {cell: sorted(own, key=lambda each: each.summary["seed"]) for cell, own in sorted(finished.items())}
    results = {**collect(by_cell, ablation.settings.metric, bool(args.search)), "failed": failed}
    show(write_tables(results, out, f"Ablation {file.stem}"))
    logging.info("tables and runs are in %s", out)
    return 1 if failed else 0


def _list(ablation: Ablation, args: argparse.Namespace) -> list[Run]:
    """All runs of the file's cells, made before the first begins, so that an invalid one is reported at once."""
    names = [cell.name for cell in ablation.cells]
    only = names_in(args.only, names)
    if unknown := sorted({*only} - {*names}):
        raise UserError(f"{ablation.file} has no cell {', '.join(unknown)}; it has {', '.join(names)}")
    wanted = [(seed, cell) for cell in ablation.chosen(only) for seed in ablation.seeds(cell, args.seeds)]
    # by seed: every cell has a first number before one has its second
    return [ablation.run(cell, seed) for seed, cell in sorted(wanted, key=lambda each: each[0])]
