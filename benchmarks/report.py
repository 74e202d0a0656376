"""One table and one plot of what was measured beside its floor, from the records in benchmarks/results.

    python benchmarks/report.py  # writes report.md and report.png beside the records

A floor is the least that the same work could take here: the matrix products of a training step, made again alone at the
same shapes (`floors.py`), and what it must read and write of the item table at the rate of a copy; the products of
exact evaluation in the best of several blockings; those of a loss over the catalogue; those of an epoch's steps; those
of exact search, which for one user wait for the items' bytes; ``import torch`` for the start; reading a file for
preparing it. "of it bytes" is the part of a floor that is memory. Records without a floor are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import records

RESULTS = Path(__file__).resolve().parent / "results"


class Measured(NamedTuple):
    """Seconds of some work, and of its floor; bytes: the part of the floor that is reading and writing."""

    what: str
    seconds: float
    floor: float
    bytes: float = 0.0


def of_steps(record: dict) -> Iterator[Measured]:
    for each in record.get("results", [record]):
        if "products_seconds" not in each:
            continue
        shared = each["negatives_sharing"]
        shared = f"{shared} of {each['negatives_block_size']}" if shared == "block" else shared
        drawn = f"{each['num_negatives']} negatives a {shared}"
        if config := each.get("gin_config_file"):
            drawn = Path(config).name
        what = f"step, {each['encoder']}, {each['num_items']:,} items, {drawn}"
        if each.get("optimizer", "adamw") != "adamw":
            what += f", {each['optimizer']}"
        read = each.get("bytes_seconds", 0.0)
        yield Measured(what, each["step_seconds"], each["products_seconds"] + read, read)
        if floor := each.get("evaluation_products_seconds"):
            what = f"evaluation, {each['encoder']}, {each['evaluation_users']:,} users, {each['num_items']:,} items"
            yield Measured(what, each["evaluation_seconds"], floor)


def of_evaluation(record: dict) -> Iterator[Measured]:
    setup, best = record["setup"], max(record["products_users_per_second"].values())
    what = f"exact ranks of {setup['users']:,} users among {setup['items']:,} items"
    yield Measured(what, record["seconds"], setup["users"] / best)


def of_catalogue_loss(record: dict) -> Iterator[Measured]:
    what = f"{record['loss']} over {record['items']:,} items, {record['tokens']:,} tokens"
    yield Measured(what, record["seconds"], record["products_seconds"])


def of_search(record: dict) -> Iterator[Measured]:
    setup, found = record["setup"], record["results"]
    many, one = (found[name]["milliseconds"] for name in ("many_users", "one_user"))
    what = f"best {setup['k']} of {setup['items']:,} items for {setup['users']:,} users"
    yield Measured(what, many["search"]["median"] / 1e3, many["products"]["median"] / 1e3)
    # Of one user the products wait for the items: their bytes at the rate of a copy are the floor.
    numbers = setup["one_user_items"] * setup["dim"]
    what = f"best {setup['k']} of {setup['one_user_items']:,} items for one user"
    ways = {"search": (4, ""), "quantized_search": (1, ", by 8-bit integers"), "whole_answer": (1, ", whole answer")}
    for name, (width, how) in ways.items():
        if name in one and "copied_gb_a_second" in record:
            floor = width * numbers / record["copied_gb_a_second"] / 1e9
            yield Measured(what + how, one[name]["median"] / 1e3, floor, floor)


def of_epoch(record: dict) -> Iterator[Measured]:
    for each in record.get("runs", [record]):
        what = f"training epoch of main.py, {each['profile']}, {each['users']:,} users"
        yield Measured(what, each["training_seconds"], each["products_seconds"])


def of_startup(record: dict) -> Iterator[Measured]:
    for name, what in (("help", "main.py --help"), ("first_step", "main.py to the end of its first step")):
        yield Measured(what, record[f"{name}_seconds"], record["import_torch_seconds"])


def of_preparation(record: dict) -> Iterator[Measured]:
    for each in record.get("runs", [record]):
        if reading := each.get("reading_seconds"):
            yield Measured(f"preparation of {each['lines']:,} ratings", each["seconds"], reading, reading)


READERS = {
    "train_step.json": of_steps,
    "epoch.json": of_epoch,
    "evaluate.json": of_evaluation,
    "catalogue_loss.json": of_catalogue_loss,
    "recommend.json": of_search,
    "startup.json": of_startup,
    "prepare.json": of_preparation,
}


def measured(folder: Path) -> list[Measured]:
    """Of all records of a folder."""
    found = ((folder / name, read) for name, read in READERS.items())
    return [each for path, read in found if path.exists() for each in read(json.loads(path.read_text()))]


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = ["| | seconds | floor | of it bytes | times its floor |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        share = f"{r.bytes / r.floor:.0%}" if r.bytes else ""
        lines.append(f"| {r.what} | {r.seconds:.4g} | {r.floor:.4g} | {share} | {r.seconds / r.floor:.2f} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [r.seconds for r in rows], height=0.7, color="#9ecae1", label="measured")
    axes.barh(places, [r.floor for r in rows], height=0.35, color="#08519c", label="floor")
    axes.set_yticks(places, [r.what for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--out", type=Path, help="folder of the report, unless that of the records")
    args = parser.parse_args()
    out = args.out or args.results
    out.mkdir(parents=True, exist_ok=True)
    rows = measured(args.results)
    (out / "report.md").write_text(table(rows))
    if rows:
        plot(rows, out / "report.png")
    print(table(rows))
    records.finish({"rows": len(rows)})


if __name__ == "__main__":
    main()
