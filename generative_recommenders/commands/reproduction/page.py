"""Page of a reproduction: published beside measured figures, lane by lane, from the JSON files of the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from generative_recommenders.commands.ablation.plan import Ablation
from generative_recommenders.commands.ablation.records import Finished
from generative_recommenders.commands.ablation.tables import (
    collect,
    draw_means,
    interval_text,
    known,
    markdown_table,
    mean_and_deviation,
    pair_table,
)
from generative_recommenders.commands.reproduction.results import finished_of, read_results
from generative_recommenders.data.preparation.folder import new_file, write_text

TABLES = {"hstu": "HSTU", "encoders": "Encoders and objectives", "losses": "Losses", "mol": "Mixture of logits"}
COLUMNS = ("hr@10", "ndcg@10", "mrr")


def write_page(name: str, lanes: Sequence[Ablation], results: Path, missing: Mapping[str, str]) -> str:
    """Writes ``results/NAME.md`` and a picture a lane beside the JSON files; returns the text.

    missing: by lane, why this machine could not run it.
    """
    records = read_results(results / name)
    lines = [
        f"# {name}: published and measured", "",
        f"Made by `python -m generative_recommenders.reproduce {name}` from the JSON files in `{name}/`, one a run. "
        "Figures of different lanes do not compare: they split the data in other ways, "
        "and choose the epoch by other targets.",
    ]  # fmt: skip
    for lane in lanes:
        own = [record for record in records if record["lane"] == lane.name]
        lines += ["", *_lane(lane, own, results / name, missing.get(lane.name))]
    text = "\n".join(lines) + "\n"
    write_text(results / f"{name}.md", text)
    return text


def _lane(lane: Ablation, records: Sequence[Mapping[str, Any]], folder: Path, missing: str | None) -> list[str]:
    settings = lane.settings
    lines = [f"## {settings.title or lane.name}", ""]
    if settings.needs:
        lines += [f"Needs: {settings.needs}.", ""]
    if missing:
        lines += [f"Not run on this machine: {missing}", ""]
    by_cell: dict[str, list[Finished]] = {cell.name: [] for cell in lane.cells}
    done: list[Mapping[str, Any]] = []
    for record in records:
        if "failed" in record or record["cell"] not in by_cell:
            continue
        test = record["test"]
        if record["protocol"] == "paper" and record["best"]:
            # the figures of the epoch of the best test NDCG@10, which published tables have
            test = {**test, **{name: record["best"][name] for name in COLUMNS}}
        done.append({**record, "test": test})
        by_cell[record["cell"]].append(finished_of(done[-1]))
    results = collect({cell: runs for cell, runs in by_cell.items() if runs}, settings.metric)
    rows = {row["cell"]: row for row in results["cells"]}
    if done:
        lines += [*_conditions(lane, done), ""]
        _draw(lane, results, done, folder / f"{lane.name}.png")
        lines += [f"![{settings.metric.upper()} of each model]({folder.name}/{lane.name}.png)", ""]
    for table, cells in settings.tables.items():
        lines += [f"### {TABLES.get(table, table)}", "", *_table(lane, cells, rows, done), ""]
    if results["pairs"]:
        lines += [
            "### Differences", "",
            f"Of {settings.metric.upper()}: two-sided paired permutation tests over users, p corrected over all "
            f"{len(results['pairs'])} pairs (Holm).", "",
            *markdown_table(pair_table(results)), "",
        ]  # fmt: skip
    if done:
        lines += ["### Runs", "", *_runs(done, folder.name), ""]
    lines += [
        f"failed: {each['cell']}, seed {each['seed']}: {each['failed']}\n" for each in records if "failed" in each
    ]
    return "\n".join(lines).rstrip().splitlines()


def _conditions(lane: Ablation, done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Protocol, split, hardware, and what the data lack of those that the published figures are of."""
    first, data = done[0], done[0].get("data", {})
    lines = [
        f"Protocol `{split['protocol']}`, split `{split['split_hash']}`; {split['conditions']}."
        for split in {each["split_hash"]: each for each in done}.values()
    ]
    if first["protocol"] == "paper":
        lines.append(
            "Figures are those of the epoch with the best test NDCG@10, as published; intervals and differences are of "
            "the last epoch."
        )
    if data:
        counts = ", ".join(f"{data[each]:,} {each}" for each in ("users", "items", "events"))
        lines.append(f"Data `{data['data_hash']}`: {counts}.")
        published = lane.settings.data
        if any(published[each] != data[each] for each in published):
            of = ", ".join(f"{count:,} {each}" for each, count in published.items())
            lines.append(f"The published figures are of the whole data set ({of}): these are near, not the same.")
        if not data["times"] and published:
            lines.append(
                "The data here have no times: attention biases by time do not act, as they did in published runs."
            )
        if first["protocol"] == "paper" and data["times"] and data["tied_events"] and data["tie_order"] != "published":
            lines.append("Ties in time are not in the published programs' order.")
        if first["protocol"] == "paper" and not data["unrated_items"] and published:
            lines.append("Items that nobody rated, candidates in the published runs, are not in these data.")
    machines = {
        f"{each['environment'].get('device')}, {each.get('processor')} ({each.get('cores')} cores), torch "
        f"{each['environment'].get('torch')}, runs at a time: {each.get('runs_at_a_time')}"
        for each in done
    }
    lines.append(f"Ran on {'; '.join(sorted(machines))}. Runs at a time share the machine and its seconds.")
    return [f"- {line}" for line in lines]


def _table(
    lane: Ablation, cells: Sequence[str], rows: Mapping[str, Mapping[str, Any]], done: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Cells as the lane names them, then what holds for any model on these data; published columns where there are
    figures."""
    published = lane.settings.published
    shown = COLUMNS[:2] if published else ()
    head = [
        "", *(f"published {name.upper()}" for name in shown), "HR@10", "NDCG@10",
        f"95 % interval of {lane.settings.metric.upper()}", "MRR", "seeds", "epochs", "seconds per epoch",
        "peak memory, MiB",
    ]  # fmt: skip
    table = [head]
    for cell in cells:
        reported = published.get(cell, {})
        named = f"{cell} ({reported['source']})" if "source" in reported else cell
        figures = [f"{reported[name]:.4f}" if name in reported else "" for name in shown]
        row = rows.get(cell)
        if row is None:
            table.append([named, *figures, "not run", *[""] * 7])
            continue
        hits, gain, mrr = (mean_and_deviation(row["test"][name]) for name in COLUMNS)
        epochs = sorted({record["epochs"] for record in done if record["cell"] == cell})
        table.append(
            [
                named, *figures, hits, f"**{gain}**", interval_text(row["interval"]), mrr, str(len(row["seeds"])),
                ", ".join(map(str, epochs)), known(row["seconds_per_epoch"], ".3g"), known(row["memory_mb"], ","),
            ]
        )  # fmt: skip
    others = {**done[0].get("best_possible", {}), **done[0]["baselines"]} if done else {}
    for name, metrics in others.items():
        hits, gain, mrr = (f"{metrics[each]:.4f}" for each in COLUMNS)
        table.append([f"*{name}*", *[""] * len(shown), hits, gain, "", mrr, *[""] * 4])
    return markdown_table(table)


def _runs(done: Sequence[Mapping[str, Any]], folder: str) -> list[str]:
    table = [["", "seed", "HR@10", "NDCG@10", "best epoch", "of", "minutes", "device", "commit", "settings"]]
    for each in done:
        seconds = each.get("seconds")
        table.append(
            [
                f"[{each['cell']}]({folder}/{each['file']})", str(each["seed"]), f"{each['test']['hr@10']:.4f}",
                f"{each['test']['ndcg@10']:.4f}", str(each["best_epoch"] or ""), str(each["epochs"]),
                "" if seconds is None else f"{seconds / 60:.1f}", str(each["environment"].get("device", "")),
                f"`{each.get('commit', '')}`", f"`{each['settings_sha256']}`",
            ]
        )  # fmt: skip
    return markdown_table(table)


def _draw(lane: Ablation, results: Mapping[str, Any], done: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Means with intervals beside published figures, and the metric by epoch, as a PNG."""
    from matplotlib.figure import Figure

    metric = lane.settings.metric
    figure = Figure(figsize=(11, max(3.5, 1.2 + 0.35 * len(results["cells"]))), layout="constrained")
    means, curves = figure.subplots(1, 2)
    published = lane.settings.published
    draw_means(means, results, {cell: given[metric] for cell, given in published.items() if metric in given})
    means.set_title("test; crosses: published")
    for row in results["cells"]:
        own = [each["history"] for each in done if each["cell"] == row["cell"] and metric in each["history"]]
        if own:  # of several seeds the first: the table has their deviation
            curves.plot(own[0]["epoch"], own[0][metric], linewidth=1.2, label=row["cell"])
    curves.set_title("by epoch, on the " + ("test" if lane.base.data.protocol == "paper" else "validation") + " items")
    curves.set_xlabel("epoch")
    curves.set_ylabel(metric.upper())
    curves.grid(alpha=0.3)
    if curves.lines:
        curves.legend(fontsize=7, frameon=False, ncols=2)
    with new_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
