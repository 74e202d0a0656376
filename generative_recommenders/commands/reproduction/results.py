"""Results of a reproduction: one JSON file a run, from which alone the page is made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from generative_recommenders.commands.ablation.plan import Run
from generative_recommenders.commands.ablation.records import Finished
from generative_recommenders.config.gin import ROOT
from generative_recommenders.data.preparation.folder import write_text
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.data.sources.synthetic_oracle import oracle
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

MOST_USERS = 50_000
"""Data of more users keep no ranks in their JSON files: they would take megabytes each, and tests need no more
users."""


def file_of(folder: Path, lane: str, cell: str, seed: int) -> Path:
    return folder / f"{lane}-{cell}-seed-{seed}.json"


def write_finished(path: Path, lane: str, finished: Finished, facts: Mapping[str, Any]) -> None:
    """The result of a run. facts: what it ran on, beside its own summary."""
    record: dict[str, Any] = {"lane": lane, **finished.summary, **facts}
    ranks = finished.ranks
    if ranks is not None and len(ranks) <= MOST_USERS:
        lines = "\n".join(f"{user}\t{item}" for user, item in ranks.select("user_id", "item_id").iter_rows())
        record["targets_sha256"] = hashlib.sha256(lines.encode()).hexdigest()[:16]
        record["ranks"] = ranks["rank"].to_list()
    _write(path, record)


def write_failed(path: Path, run: Run, lane: str, line: str) -> None:
    """A run that failed, with its line; a later start replaces it."""
    _write(path, {"lane": lane, "cell": run.cell.name, "seed": run.settings.schedule.random_seed, "failed": line})


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """One line a field, so that files compare; written to another name first: the machine may go at any moment."""
    # Six digits of numbers, which is more than the data bear.
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rounded.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, failed ones too, by name. UserError for a file that is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"lane", "cell", "seed"} <= record.keys():
            raise UserError(f"{path} is no result of a run: move it away, and the run is made again")
        found.append({**record, "file": path.name})
    return found


def finished_of(record: Mapping[str, Any]) -> Finished:
    """A result as tables of ablations take it: users are known by their place, targets by one hash of all."""
    if record.get("ranks") is None:
        return Finished(dict(record), None)
    ranks = pl.DataFrame({"rank": pl.Series(record["ranks"], dtype=pl.Int64)}).with_row_index("user_id")
    targets = pl.lit(record["targets_sha256"]).alias("item_id")
    return Finished(dict(record), ranks.with_columns(targets))


def machine_facts(jobs: int, commit: str | None) -> dict[str, Any]:
    """Common facts of all runs of this start. jobs: runs at a time, which share the machine and its seconds. commit: of
    this code, else what git says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "commit": commit or _commit(),
        "processor": next(names, platform.processor() or "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "runs_at_a_time": jobs,
    }


def _commit() -> str:
    """The commit of this code, with a + where files were changed since; "unknown" where it is no checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    # A virtual environment may lie inside somebody's own repository, which git must not find.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def best_possible(dataset: SequenceDataset) -> dict[str, dict[str, float]]:
    """By name, the metrics that the generator of synthetic books could expect at most on the test items, repeats
    counted as misses; empty for other data."""
    settings = dataset.manifest.source.get("settings")
    if settings is None or dataset.manifest.source.get("dataset") != "synthetic-books":
        return {}
    score = oracle(SyntheticBooksSettings(**settings), cutoffs=(10,), max_users=6_000, repeats_count=False)
    return {"best possible": {"hr@10": score.hit_rate[10], "ndcg@10": score.ndcg[10], "mrr": score.mrr}}


def data_facts(dataset: SequenceDataset) -> dict[str, Any]:
    """What the page says of the data, and of what published figures had and these lack."""
    manifest = dataset.manifest
    return {
        "users": dataset.num_users,
        "items": dataset.num_items,
        "events": dataset.num_events,
        "times": dataset.timestamps is not None,
        "ratings": dataset.ratings is not None,
        "tied_events": manifest.statistics.get("tied_events"),
        "tie_order": manifest.choices.get("tie_order"),
        "unrated_items": manifest.counts.get("unrated_items", 0),
        "source": manifest.source.get("dataset"),
        "data_hash": manifest.data_hash,
    }
