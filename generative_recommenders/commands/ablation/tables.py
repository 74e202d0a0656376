"""Tables of an ablation: Markdown, CSV, LaTeX, a picture and JSON, with intervals over users and tests between
cells."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import polars as pl
from absl import logging

from generative_recommenders.commands.ablation.records import Finished, best_validation
from generative_recommenders.commands.comparison import (
    METRICS,
    compare,
    mean_over_runs,
    user_values,
)
from generative_recommenders.data.preparation.folder import new_file, write_text
from generative_recommenders.evaluation.significance import bootstrap_interval, holm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CANDIDATES = ("catalogue", "seen_filter")
"""What says which items a target is ranked among: ranks among others do not compare."""
ALL_PAIRS = 20
"""Cells up to which every pair is tested; of more, the best one against each other."""


def collect(runs: Mapping[str, Sequence[Finished]], metric: str, by_validation: bool = False) -> dict[str, Any]:
    """Numbers of all cells that have a run, best first, and of the tests between them, as JSON has them.

    runs: the finished runs by cell. by_validation: best by the validation targets, where there are some, as a search
    has to choose; else by the test targets. Of a cell: mean and deviation over seeds, the 95 % interval of the metric
    over users (their values averaged over seeds), its value on validation, seconds, memory. Of a pair: the difference,
    p, and p after Holm's correction over all pairs.
    Cells on other splits or with other candidates, those whose seeds are on several splits, and those without their
    users' ranks, are not compared.
    """
    values: dict[str, pl.DataFrame] = {}
    rows: list[dict[str, Any]] = []
    for cell, own in runs.items():
        found = [run.summary for run in own]
        users = [user_values(run.ranks, metric, run.summary.get("num_items")) for run in own if run.ranks is not None]
        splits = sorted({each["split_hash"] or "" for each in found})
        if len(splits) > 1:
            logging.warning("the runs of %s are on different splits of the data: it is not compared", cell)
        elif len(users) == len(own):
            values[cell] = mean_over_runs(users)
        scored = [value for each in found if (value := best_validation(each, metric)) is not None]
        seconds = [each["seconds_per_epoch"] for each in found if each["seconds_per_epoch"] is not None]
        rows.append(
            {
                "cell": cell,
                "seeds": [each["seed"] for each in found],
                "test": {name: _spread([each["test"][name] for each in found]) for name in METRICS},
                "validation": statistics.fmean(scored) if len(scored) == len(found) else None,
                "interval": list(bootstrap_interval(values[cell]["value"].to_numpy())) if cell in values else None,
                "users": len(values[cell]) if cell in values else None,
                "seconds_per_epoch": statistics.median(seconds) if seconds else None,
                "memory_mb": max((each["memory_mb"] for each in found if each["memory_mb"]), default=None),
                "best_epochs": [each["best_epoch"] for each in found],
                "split_hash": ", ".join(splits),
                **{name: found[0].get(name) for name in CANDIDATES},
                "conditions": found[0]["conditions"],
                "bindings": found[0]["bindings"],
            }
        )
    by_validation &= all(row["validation"] is not None for row in rows)
    rows.sort(key=lambda row: -(row["validation"] if by_validation else row["test"][metric]["mean"]))
    chosen = rows[0]["cell"] if by_validation and rows else None
    return {"metric": metric, "cells": rows, "pairs": _pairs(rows, values), "chosen": chosen}


def _spread(numbers: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(numbers), "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None}


def _pairs(rows: Sequence[Mapping[str, Any]], values: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    chosen = itertools.combinations(rows, 2) if len(rows) <= ALL_PAIRS else zip(itertools.repeat(rows[0]), rows[1:])
    found: list[dict[str, Any]] = []
    unlike: list[tuple[str, str]] = []
    for first, second in chosen:
        names = first["cell"], second["cell"]
        if first["split_hash"] != second["split_hash"] or not {*names} <= values.keys():
            continue
        # Records of earlier releases do not say it: they are compared as before.
        if any(None not in (first[each], second[each]) and first[each] != second[each] for each in CANDIDATES):
            unlike.append(names)
            continue
        test = compare(values[names[0]], values[names[1]], names)
        found.append(
            {
                "cells": list(names), "users": test.users, "difference": test.first - test.second,
                "interval": list(test.interval), "p": test.p,
            }
        )  # fmt: skip
    if unlike:
        logging.warning(
            "cells with another catalogue or seen filter are not compared: %d pairs, as %s and %s",
            len(unlike), *unlike[0],
        )  # fmt: skip
    for pair, adjusted in zip(found, holm([pair["p"] for pair in found])):
        pair["p_holm"] = adjusted
    return found


def write_tables(results: Mapping[str, Any], out: Path, title: str) -> str:
    """Writes results.json and the table in all of its forms; returns the Markdown."""
    table, pairs, exact_pairs = (
        pd.DataFrame(rows, columns=head)
        for head, *rows in (table_of(results), pair_table(results), pair_table(results, ".6g"))
    )
    text = markdown(results, title)
    files = {
        "results.json": json.dumps(results, indent=2) + "\n",
        "table.md": text + "\n",
        "table.csv": table.to_csv(index=False),
        "pairs.csv": exact_pairs.to_csv(index=False),
        "table.tex": table.to_latex(index=False, escape=True).replace("±", r"$\pm$"),
        "pairs.tex": pairs.to_latex(index=False, escape=True),
    }
    for name, content in files.items():
        write_text(out / name, content)
    if results["cells"]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.35 * len(results["cells"])), layout="constrained")
        draw_means(figure.subplots(), results, {})
        with new_file(out / "table.png") as scratch:
            figure.savefig(scratch, format="png", dpi=120)
    return text


def table_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The table: its head, then its rows."""
    names = [results["metric"], *(name for name in METRICS if name != results["metric"])]
    head = [
        "cell", "seeds", names[0].upper(), "95 % interval", *(name.upper() for name in names[1:]),
        f"validation {names[0].upper()}", "seconds per epoch", "peak memory, MiB", "best epoch", "split",
    ]  # fmt: skip
    table = [head]
    for row in results["cells"]:
        first, *others = (mean_and_deviation(row["test"][name]) for name in names)
        table.append(
            [
                row["cell"], str(len(row["seeds"])), first, interval_text(row["interval"]), *others,
                known(row["validation"], ".4f"), known(row["seconds_per_epoch"], ".3g"), known(row["memory_mb"], ","),
                ", ".join(str(each) for each in row["best_epochs"] if each is not None),
                ", ".join(split[:8] for split in row["split_hash"].split(", ")),
            ]
        )  # fmt: skip
    return table


def known(number: float | None, form: str) -> str:
    """The number as text, nothing where it is None."""
    return "" if number is None else format(number, form)


def interval_text(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def mean_and_deviation(spread: Mapping[str, float | None]) -> str:
    text = f"{spread['mean']:.4f}"
    return text if spread["deviation"] is None else f"{text} ± {spread['deviation']:.4f}"


def pair_table(results: Mapping[str, Any], p: str = ".4f") -> list[list[str]]:
    rows = [["better", "other", "difference", "95 % interval", "p", "p (Holm)"]]
    for pair in results["pairs"]:
        low, high = pair["interval"]
        rows.append(
            [
                *pair["cells"], f"{pair['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", format(pair["p"], p),
                format(pair["p_holm"], p),
            ]
        )  # fmt: skip
    return rows


def markdown(results: Mapping[str, Any], title: str) -> str:
    """The table, the tests between cells, what failed, and the conditions that the numbers hold under."""
    table = markdown_table(table_of(results)) if results["cells"] else ["no finished run"]
    lines = [f"# {title}", "", *table]
    if results["chosen"] is not None:
        lines += ["", f"chosen by validation {results['metric'].upper()}: {results['chosen']}"]
        lines += ["", *(f"- {row['cell']}: {', '.join(row['bindings'])}" for row in results["cells"])]
    if results["pairs"]:
        lines += [
            "",
            f"Differences of {results['metric'].upper()}: two-sided paired permutation tests over users, p corrected "
            f"over all {len(results['pairs'])} pairs.",
            "",
            *markdown_table(pair_table(results)),
        ]
    for name, line in results.get("failed", {}).items():
        lines += ["", f"failed: {name}: {line}"]
    conditions = dict.fromkeys((row["split_hash"], row["conditions"]) for row in results["cells"])
    lines += ["", *(f"split {split}: {text}" for split, text in conditions)]
    return "\n".join(lines).rstrip()


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(each)} |" for each in table)
    return [head, f"|{'---|' * len(table[0])}", *rows]


def draw_means(axes: Axes, results: Mapping[str, Any], published: Mapping[str, float]) -> None:
    """Means of the metric with their intervals over users, best on top. published: figures of the metric by cell, as
    crosses beside the measured ones."""
    rows = results["cells"][::-1]
    for place, row in enumerate(rows):
        if row["cell"] in published:
            axes.plot(published[row["cell"]], place, "x", color="tab:orange")
        if row["interval"] is not None:
            axes.plot(row["interval"], [place, place], color="tab:blue", linewidth=2)
        axes.plot(row["test"][results["metric"]]["mean"], place, "o", color="tab:blue")
    axes.set_yticks(range(len(rows)), [row["cell"] for row in rows], parse_math=False)
    axes.set_xlabel(f"{results['metric'].upper()}, test, 95 % interval over users")
    axes.grid(axis="x", alpha=0.3)
