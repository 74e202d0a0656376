"""Audit of a prepared data set: what a reviewer of its numbers would ask, as text, JSON and PNG."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from matplotlib.figure import Figure

from generative_recommenders.data.preparation.folder import check_file, new_file, write_text
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.statistics import (
    event_columns,
    length_curve,
    popularity_curve,
    statistics_lines,
    timeline,
)
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.order_dependence import METRIC, SHUFFLES, order_dependence
from generative_recommenders.run.report import pictures


def write_audit(folder: Path, output: Path | None = None) -> str:
    """Writes NAME.audit.txt, .json and .png into ``output``, by default beside the prepared ``folder``; returns the
    text."""
    output = folder.absolute().parent if output is None else output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: not a folder; name one for the reports")
    paths = {suffix: output / f"{folder.absolute().name}.audit.{suffix}" for suffix in ("txt", "json", "png")}
    for path in paths.values():
        check_file(path)
    dataset = SequenceDataset.open(folder)
    dataset.verify()
    split = make_split(dataset)
    found: dict[str, Any] = {
        "name": dataset.manifest.name,
        "counts": dataset.manifest.counts,
        "statistics": dataset.manifest.statistics,
        "choices": dataset.manifest.choices,
        "data_hash": dataset.manifest.data_hash,
        "split": {"protocol": split.protocol, "hash": split.hash, "counts": split.counts},
        "lengths": length_curve(dataset),
        "popularity": popularity_curve(dataset),
        "timeline": timeline(dataset, split),
        "event_columns": event_columns(dataset),
        "order": None,
    }
    logging.info("lengths, popularity, times and columns are counted; a small model asks whether order matters")
    if split.counts["test_users"]:
        found["order"] = dataclasses.asdict(order_dependence(dataset))
    text = "\n".join(_lines(found, statistics_lines(dataset.manifest)))
    write_text(paths["txt"], text + "\n")
    write_text(paths["json"], json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    with new_file(paths["png"]) as scratch:
        _figure(found).savefig(scratch, format="png", dpi=110)
    return f"{text}\nwritten: {', '.join(map(str, paths.values()))}"


def _lines(found: Mapping[str, Any], statistics: list[str]) -> Iterator[str]:
    counts, popularity = found["counts"], found["popularity"]
    yield f"audit of {found['name']}, data hash {found['data_hash']}"
    yield f"{counts['users']:,} users  {counts['items']:,} items  {counts['events']:,} events"
    yield from statistics
    yield "events a user: " + _quantiles(found["lengths"]["quantiles"], "{:g}")
    tops = popularity["share_of_events_of_the_top"].items()
    yield "popularity: the top " + ", ".join(f"{float(share):.1%} of the items has {part:.1%}" for share, part in tops)
    yield (
        f"Gini coefficient {popularity['gini']:.3f}; {popularity['items_with_fewer_than_5_events']:,} items have fewer "
        "than 5 events"
    )
    times = found["timeline"]
    if times is None:
        yield "times: none, so nothing is known of leakage in time"
    else:
        for part, quantiles in times["quantiles"].items():
            yield f"times of {part} events: {_quantiles(quantiles)}"
        if times["training_later_than_test"] is not None:
            yield (
                f"leakage in time under leave_one_out: {times['training_later_than_test']:.1%} of the training events "
                "are later than a test target, in the mean over the targets; protocol global_time has none"
            )
    for each in found["event_columns"]:
        line = f"column {each['name']} ({each['kind']}): {each['missing']:.1%} missing"
        if "quantiles" in each:
            line += "; " + _quantiles(each["quantiles"], "{}" if each["kind"] == "time" else "{:g}")
        if each.get("most_frequent") is not None:
            line += f"; {each['values']:,} values, {each['share_of_most_frequent']:.1%} are {each['most_frequent']!r}"
        yield line
    order = found["order"]
    if order is None:
        yield "order of events: no user has a test target under leave_one_out"
        return
    drawn = " drawn at random" if order["sampled"] else ""
    yield (
        f"does order matter? {METRIC} of {order['users']:,} users{drawn} on histories in true order, and shuffled "
        f"(mean of {SHUFFLES}); fitted on the true order, seen filter {order['seen_filter']!r}, SASRec of width 64 "
        f"after {order['steps']:,} steps (arXiv 2408.12008)"
    )
    yield f"{'':24}{'true':>10}{'shuffled':>10}{'change':>10}"
    for name, scores in order["scores"].items():
        true, mixed = scores["true"], scores["shuffled"]
        change = f"{mixed / true - 1:>+10.1%}" if true else f"{'':>10}"
        yield f"{name:24}{true:>10.4f}{mixed:>10.4f}{change}"


def _quantiles(quantiles: Mapping[str, Any], form: str = "{}") -> str:
    return ", ".join(f"{float(share):.0%} {form.format(value)}" for share, value in quantiles.items())


def _figure(found: Mapping[str, Any]) -> Figure:
    """Lengths, popularity, the timeline of the split, and scores in true and shuffled order."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (lengths, popularity), (times, order) = figure.subplots(2, 2)
    figure.suptitle(found["name"])
    pictures.draw_lengths(lengths, found["lengths"])
    pictures.draw_popularity(popularity, found["popularity"])
    times.set(title="times of training events and of targets (leave_one_out)")
    if found["timeline"] is None:
        times.text(0.5, 0.5, "no times", ha="center", va="center", transform=times.transAxes)
    else:
        pictures.draw_timeline(times, found["timeline"], 10, 10)
        times.legend(fontsize="small")
    order.set(title=f"{METRIC} on true and shuffled histories")
    if found["order"] is not None:
        scores = found["order"]["scores"]
        for number, which in enumerate(("true", "shuffled")):
            places = [place + 0.4 * number for place in range(len(scores))]
            order.bar(places, [each[which] for each in scores.values()], 0.4, label=which)
        order.set_xticks([place + 0.2 for place in range(len(scores))], list(scores))
        order.legend(fontsize="small")
    for axes in (lengths, popularity, times, order):
        axes.grid(alpha=0.3)
    return figure
