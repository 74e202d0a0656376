"""Records that a run of an ablation keeps in its folder."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from generative_recommenders.commands.ablation.plan import Run, made_settings
from generative_recommenders.commands.comparison import METRICS
from generative_recommenders.evaluation.baselines import BASELINES
from generative_recommenders.run.report.records import read_records

SELECTION = "ndcg@10"
"""Metric by which the best epoch is chosen."""


def is_trained(run: Run) -> bool:
    """Whether the run has trained all of its epochs, or stopped early, and was scored."""
    lines, made = read_records(run.folder / "metrics.jsonl"), made_settings(run)
    if not lines or lines[-1].get("part") != "final" or made is None:
        return False
    return made.schedule.num_epochs == run.settings.schedule.num_epochs


def ranks_of(run: Run) -> pl.DataFrame | None:
    """``user_id, item_id, rank`` (empty for a miss) of a finished run's model; None where they are still to be
    measured."""
    return pl.read_parquet(run.measured) if run.measured.exists() else None


def best_validation(summary: Mapping[str, Any], metric: str) -> float | None:
    """The metric's value on validation at the epoch that was tested; None where no validation targets were scored."""
    best = summary.get("best") or {}
    return None if summary.get("protocol") == "paper" else best.get(metric)


class Finished(NamedTuple):
    """Contents of the tables: the summary of a finished run, and its users' ranks where they are known."""

    summary: dict[str, Any]
    ranks: pl.DataFrame | None

    @classmethod
    def of(cls, run: Run) -> Finished:
        return cls(summary(run), ranks_of(run))


def summary(run: Run) -> dict[str, Any]:
    """Numbers of a finished run and what they hold under, as JSON has them.

    test, baselines: metrics. best, last: of the evaluations of these epochs, counted from 1. history: by epoch.
    seconds: of the whole run; seconds_per_epoch: the median. memory_mb: peak, of the GPU where one was used. num_items:
    V, None where the run did not record it.
    """
    lines = read_records(run.folder / "metrics.jsonl")
    epochs, final = [line for line in lines if "epoch" in line], lines[-1]
    clock = [0.0, *(line["seconds"] for line in epochs)]
    # Between full evaluations a part of the users is scored, which no epoch is chosen by.
    scored = [line for line in epochs if SELECTION in line and line.get("full", True)]
    shown = ("train_loss", *METRICS)
    at = [{"epoch": 1 + line["epoch"], **{name: line[name] for name in shown if name in line}} for line in scored]
    best = max(at, key=lambda line: line[SELECTION], default=None)
    model = final["model"]
    return {
        "cell": run.cell.name,
        "seed": run.settings.schedule.random_seed,
        "dataset": run.settings.data.dataset_name,
        "protocol": run.settings.data.protocol,
        "catalogue": run.settings.data.catalogue,
        "seen_filter": run.settings.evaluation.seen_filter,
        "num_items": final.get("num_items"),
        "bindings": list(run.cell.bindings),
        "settings_sha256": run.settings_sha256,
        "test": final["results"][model],
        "baselines": {name: final["results"][name] for name in BASELINES if name in final["results"]},
        "best_epoch": best["epoch"] if best else None,
        "best": best,
        "last": at[-1] if at else None,
        "epochs": len(epochs),
        "history": {
            name: [line[name] for line in at] for name in ("epoch", *shown) if all(name in line for line in at)
        },
        "seconds_per_epoch": statistics.median(b - a for a, b in itertools.pairwise(clock)) if epochs else None,
        "seconds": final.get("seconds"),
        "memory_mb": final.get("peak_gpu_mb", final.get("peak_rss_mb")),
        "environment": final.get("environment", {}),
        "split_hash": final.get("split_hash"),
        "conditions": final.get("conditions"),
    }
