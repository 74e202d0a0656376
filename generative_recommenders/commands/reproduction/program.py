"""What ``python -m generative_recommenders.reproduce`` does: flags, runs, tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from generative_recommenders.commands.ablation import jobs
from generative_recommenders.commands.ablation.plan import Ablation, Cell, Run, names_in
from generative_recommenders.commands.ablation.records import Finished, is_trained, summary
from generative_recommenders.commands.reproduction import results
from generative_recommenders.commands.reproduction.lanes import data_root_of, known_names, lanes_of
from generative_recommenders.commands.reproduction.page import TABLES, write_page
from generative_recommenders.config.plugins import add_plugin_flag, load_plugins
from generative_recommenders.data.preparation.folder import check_file
from generative_recommenders.data.preparation.prepare import prepared_path
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.run.logging import show


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m generative_recommenders.reproduce",
        description="Reproduction of published tables, beside measured figures.",
    )
    made.add_argument("name", choices=known_names(), help="the data set")
    made.add_argument("--table", choices=sorted(TABLES), help="one table alone; all by default")
    made.add_argument("--lane", help="one lane alone, by the name of its file; all by default")
    made.add_argument(
        "--only", default="", help="cells to run, as CELL or LANE/CELL, with commas between; all by default"
    )
    made.add_argument("--seeds", type=int, help="runs of each cell; as its file says, or one, by default")
    made.add_argument("--jobs", type=int, help="runs at a time; one a GPU, or one, by default")
    made.add_argument("--epochs", type=int, help="epochs of every run, for a trial; as published by default")
    made.add_argument("--runs_dir", help="folder of all runs; runs/reproduce/NAME by default")
    made.add_argument("--results_dir", help="where NAME.md and NAME/*.json go; docs/results by default")
    made.add_argument("--raw_path", help="raw files of the data, instead of a download")
    made.add_argument("--data_root", default="data", help="where raw/ and prepared/ data sets lie")
    add_plugin_flag(made)
    made.add_argument("--commit", help="of this code, for the results, where git is not there to tell")
    made.add_argument(
        "--report_only",
        action="store_true",
        help="run nothing: make the page from the JSON files that are there",
    )
    return made


class _Planned(NamedTuple):
    """A run with what it needs beside its settings. facts: what its result says of machine and data."""

    lane: str
    run: Run
    data_root: Path
    result: Path
    facts: Mapping[str, Any]


def run(argv: list[str] | None) -> int:
    """Runs what is missing and writes the page; 1 where a run failed or a lane cannot be had."""
    args = parser().parse_args(argv)
    if any(given is not None and given < 1 for given in (args.seeds, args.jobs, args.epochs)):
        raise UserError("--seeds, --jobs and --epochs must be 1 or more")
    load_plugins(args.plugin)
    out = Path(args.results_dir or Path("docs") / "results")
    lanes = lanes_of(args.name, Path(args.runs_dir or Path("runs") / "reproduce" / args.name), args.epochs)
    if args.report_only:
        idle = ("table", "lane", "only", "seeds", "jobs", "epochs", "raw_path", "commit")
        given = [name for name in idle if getattr(args, name)]
        if given:
            raise UserError(f"--report_only makes the whole page of all results that are there: leave out --{given[0]}")
        show(write_page(args.name, lanes, out, {}))
        return 0
    chosen = _chosen(args, lanes)
    for place in (out / f"{args.name}.md", out / args.name / "run.json"):  # now, not when the first run is trained
        check_file(place, "--results_dir: ")
    slots = jobs.slots(args.jobs)
    machine = results.machine_facts(len(slots), args.commit)
    missing: dict[str, str] = {}
    planned: list[_Planned] = []
    for lane, cells in chosen:
        try:
            root = data_root_of(lane, args.name, Path(args.data_root), args.raw_path and Path(args.raw_path))
        except UserError as error:
            missing[lane.name] = str(error)
            logging.error("lane %s: %s", lane.name, error)
            continue
        if lane.settings.needs and "CUDA_VISIBLE_DEVICES" not in slots[0].environment:
            logging.warning("there is no GPU here; the runs of lane %s want %s", lane.name, lane.settings.needs)
        planned += _plan(lane, cells, args, root, machine, out / args.name)
    # A first number of every cell comes before a second one.
    planned.sort(key=lambda each: each.run.settings.schedule.random_seed)
    failed = _run_all(planned, slots, [f"--plugin={each}" for each in args.plugin])
    show(write_page(args.name, lanes, out, missing))
    logging.info("the page is %s, the runs are in %s", out / f"{args.name}.md", lanes[0].out.parent)
    return 1 if failed or missing else 0


def _chosen(args: argparse.Namespace, lanes: Sequence[Ablation]) -> list[tuple[Ablation, list[Cell]]]:
    """The lanes and cells that the flags mean; UserError where they mean none."""
    if args.lane is not None and args.lane not in {lane.name for lane in lanes}:
        raise UserError(f"--lane={args.lane} is none of {args.name}: {', '.join(lane.name for lane in lanes)}")
    names = {name for lane in lanes for cell in lane.cells for name in (cell.name, f"{lane.name}/{cell.name}")}
    only = names_in(args.only, names)
    if unknown := sorted({*only} - names):
        raise UserError(f"{args.name} has no cell {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    tables = sorted({table for lane in lanes for table in lane.settings.tables})
    if args.table is not None and args.table not in tables:
        raise UserError(f"{args.name} has no table {args.table}; it has {', '.join(tables)}")
    of_lanes = [(lane, lane.chosen(only, args.table)) for lane in lanes if args.lane in (None, lane.name)]
    if not any(cells for _, cells in of_lanes):
        given = [f"--{name}={value}" for name in ("table", "lane", "only") if (value := getattr(args, name))]
        raise UserError(f"no cell of {args.name} is meant by all of {' '.join(given)}")
    return [(lane, cells) for lane, cells in of_lanes if cells]


def _plan(
    lane: Ablation,
    cells: Sequence[Cell],
    args: argparse.Namespace,
    data_root: Path,
    machine: Mapping[str, Any],
    out: Path,
) -> list[_Planned]:
    """The runs of a lane that have no result yet. UserError where one cannot be meant, before any of them begins."""
    dataset = SequenceDataset.open(prepared_path(data_root, args.name)).with_catalogue(lane.base.data.catalogue)
    split_hash = cache(lambda protocol: make_split(dataset, protocol).hash)
    facts = {**machine, "data": results.data_facts(dataset), "best_possible": results.best_possible(dataset)}
    kept = {each["file"]: each for each in results.read_results(out)}
    planned = []
    for cell in cells:
        for seed in lane.seeds(cell, args.seeds):
            run = lane.run(cell, seed)
            path = results.file_of(out, lane.name, cell.name, seed)
            known, of_data = kept.get(path.name, {}), split_hash(run.settings.data.protocol)
            if (known.get("settings_sha256"), known.get("split_hash")) == (run.settings_sha256, of_data):
                logging.info("%s/%s is in %s already", lane.name, run.name, path)
            elif is_trained(run) and summary(run)["split_hash"] != of_data:
                raise UserError(
                    f"{run.folder} was trained on other data than {data_root} holds: give another --runs_dir"
                )
            else:
                planned.append(_Planned(lane.name, run, data_root, path, facts))
    return planned


def _run_all(planned: Sequence[_Planned], slots: Sequence[jobs.Slot], flags: Sequence[str]) -> int:
    """Runs all, each result written as soon as it is there; returns how many failed. flags: of every run."""
    by_folder = {each.run.folder: each for each in planned}
    failed: list[str] = []

    def done(run: Run, failure: str | None) -> None:
        own = by_folder[run.folder]
        if failure is None:
            results.write_finished(own.result, own.lane, Finished.of(run), own.facts)
            logging.info("%s/%s is done: %s", own.lane, run.name, own.result)
        else:
            failed.append(run.name)
            results.write_failed(own.result, run, own.lane, failure)
            logging.error("%s/%s failed: %s", own.lane, run.name, failure)

    def command_of(run: Run) -> list[str] | None:
        return jobs.next_command(run, [f"--data_root={by_folder[run.folder].data_root}", *flags], ["--noreport"])

    jobs.run_all((each.run for each in planned), done, slots, command_of)
    return len(failed)
