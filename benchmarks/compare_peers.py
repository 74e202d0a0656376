"""RePlay, RecTools and RecBole beside this program, on the same data by turns; the last line is JSON.

    python benchmarks/compare_peers.py --environments=/tmp/peers --output=benchmarks/results/peers.json

Each system comes from PyPI into an environment of its own under --environments, made where it is missing (a few minutes
each), and runs in a process of its own, by turns, ``--rounds`` times; the fastest round counts. The work: two blocks of
width 64 with one head, histories of up to 200 events, 128 users a step, softmax over the whole catalogue, two epochs by
each system's own trainer on its own data pipeline, then all users exactly. Figures: seconds of a step, the second
epoch, that evaluation, from the start of the process to the end of the first step, and the process's peak memory.

Evaluation is the ten best unseen items of all users in RePlay and RecTools, ranks of their targets in RecBole and here.
Where a system has no such encoder, there is no figure; HSTU is RecTools', with both biases.

Two figures have a floor, made in this program's worker: the evaluation has its matrix products (`floors.py`), memory
what the process takes once everything is imported, with each weight, its gradient and its two moments of AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import records
from made_data import movie_lengths, zipf_items
from records import ROOT

from generative_recommenders.data.preparation.prepare import prepare
from generative_recommenders.data.readers.events import RawRatings

TORCH = "torch==2.13.0"
PEERS = {
    "replay": (["replay-rec[torch]==0.22.0"], ("SASRec", "TwoTower", "DiffTransformer")),
    "rectools": (["rectools[torch]==0.19.0"], ("SASRec", "HSTU")),
    "recbole": (["recbole==1.2.1", "numpy<2", "pandas<3", "scipy<1.15"], ("SASRec",)),
}
"""Packages, and the encoders it has of those that are compared."""
FIGURES = ("step", "epoch", "evaluation", "first_step", "peak_rss_mb")
FLOORS = ("evaluation_floor", "peak_rss_mb_floor")


def made_events(users: int, items: int) -> pd.DataFrame:
    """Histories with the lengths of ML-1M, of Zipf items."""
    generator = np.random.default_rng(0)
    lengths = movie_lengths(users, generator)
    return pd.DataFrame(
        {
            "user": np.repeat(np.arange(1, users + 1), lengths),
            "item": zipf_items(lengths.sum(), items, generator),
            "timestamp": 10**9 + np.cumsum(generator.integers(1, 3600, lengths.sum())),
        }
    )


def write_data(folder: Path, events: pd.DataFrame) -> None:
    """The events in the form that each system reads, before any clock runs."""
    folder.mkdir(parents=True, exist_ok=True)
    events.to_csv(folder / "ratings.csv", index=False)
    prepare(RawRatings("ours", [folder / "ratings.csv"]), folder / "prepared" / "ours")
    replay, recbole = folder / "replay", folder / "recbole" / "ratings"
    replay.mkdir(), recbole.mkdir(parents=True)
    codes, names = pd.factorize(events["item"], sort=True)
    rows = events.assign(item=codes).groupby("user")["item"].agg(list).reset_index()
    rows.columns = ["query_id", "item_id"]
    rows.to_parquet(replay / "train.parquet")
    rows.assign(train=rows["item_id"]).to_parquet(replay / "predict.parquet")
    pd.DataFrame({"item_id": np.arange(len(names))}).to_parquet(replay / "items.parquet")
    (replay / "facts.json").write_text(json.dumps({"items": len(names)}))
    named = events.rename(columns={"user": "user:token", "item": "item:token", "timestamp": "timestamp:float"})
    named.to_csv(recbole / "ratings.inter", sep="\t", index=False)


def environment(root: Path, name: str) -> Path | None:
    """The interpreter of a peer's environment, made where it is missing; None where it cannot be."""
    python = root / name / "bin" / "python"
    if not (root / name / "ready").exists():
        print(f"{name}: installing {PEERS[name][0][0]} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", root / name], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", TORCH, *PEERS[name][0]],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
        (root / name / "ready").touch()
    return python


def measured(python: Path | str, worker: str, encoder: str, flags: argparse.Namespace) -> dict[str, Any]:
    """One run of a worker: its figures, or the last line of its error."""
    command = [
        python, ROOT / "benchmarks" / "peers" / worker, f"--folder={flags.folder}", f"--encoder={encoder}",
        f"--started={time.time()}", f"--steps={flags.steps}",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=flags.timeout,
            env=kept,
            cwd=flags.folder,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {flags.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each figure over the rounds that gave any."""
    good = [each for each in rounds if "error" not in each]
    if not good:
        return rounds[-1]
    names = [name for name in (*FIGURES, *FLOORS) if name in good[-1]]
    return good[-1] | {name: min(each[name] for each in good) for name in names}


def main() -> None:
    parser = records.parser_of(__doc__, users=1280, items=3706, rounds=2)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--folder", type=Path, help="of the data; default: beside the environments")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--encoders", nargs="*", default=["SASRec", "TwoTower", "DiffTransformer", "HSTU"])
    parser.add_argument("--steps", type=int, default=8, help="of RecBole, times 3")
    parser.add_argument("--timeout", type=float, default=900.0, help="of one run, seconds")
    parser.add_argument("--output", type=Path, help="file for the JSON")
    flags = parser.parse_args()
    flags.folder = (flags.folder or flags.environments / f"data-{flags.users}-{flags.items}").resolve()
    if not flags.folder.exists():
        part = flags.folder.with_name(f"{flags.folder.name}.part")  # so that a folder of this name is whole
        shutil.rmtree(part, ignore_errors=True)
        write_data(part, made_events(flags.users, flags.items))
        part.rename(flags.folder)
    pythons = {name: environment(flags.environments.resolve(), name) for name in flags.peers}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for encoder in flags.encoders:
        systems = [name for name in flags.peers if encoder in PEERS[name][1] and pythons[name]]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *systems)}
        for _ in range(flags.rounds):
            for name, found in runs.items():  # by turns, so that a busy minute of the machine meets all
                worker = "ours.py" if name == "ours" else f"{name}_worker.py"
                found.append(measured(pythons.get(name) or sys.executable, worker, encoder, flags))
                print(f"{encoder:<16}{name:<10}{found[-1]}", file=sys.stderr, flush=True)
        results[encoder] = {name: best(each) for name, each in runs.items()}
    print(table(results))
    summary = {
        "users": flags.users, "items": flags.items,
        "packages": {name: PEERS[name][0][0] for name in flags.peers}, "results": results,
    }  # fmt: skip
    records.finish(summary, flags.output)


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Figures of each system, and how many times ours they are."""
    lines = [f"{'':<28}" + "".join(f"{name:>22}" for name in FIGURES)]
    for encoder, systems in results.items():
        ours = systems["ours"]
        for name, figures in systems.items():
            row = f"{encoder + ', ' + name:<28}"
            for figure in FIGURES:
                value, base = figures.get(figure), ours.get(figure)
                times = f" ({value / base:.1f}x)" if value and base and name != "ours" else ""
                row += f"{'-' if value is None else f'{value:g}' + times:>22}"
            lines.append(row)
        floors = (f"{ours[f'{name}_floor']:g}" if f"{name}_floor" in ours else "" for name in FIGURES)
        lines.append(f"{encoder + ', floor':<28}" + "".join(f"{each:>22}" for each in floors))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
