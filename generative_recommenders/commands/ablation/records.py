"""What a run of an ablation has left in its folder."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import polars as pl

from generative_recommenders.commands.ablation.plan import Run, made_settings
from generative_recommenders.commands.comparison import kept_ranks


def records(run: Path) -> list[dict[str, Any]]:
    """What the run wrote so far, without a last line that was cut off."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_trained(run: Run) -> bool:
    """Whether the run has trained all of its epochs, or stopped early, and was scored."""
    lines, made = records(run.folder), made_settings(run)
    if not lines or lines[-1].get("part") != "final" or made is None:
        return False
    return made.schedule.num_epochs == run.settings.schedule.num_epochs


def ranks_of(run: Run) -> pl.DataFrame | None:
    """Ranks of the test users of a finished run; None where they are still to be measured."""
    kept = kept_ranks(run.folder)
    if kept is None and run.measured.exists():
        return pl.read_parquet(run.measured)
    return kept


def best_validation(run: Run, metric: str) -> float:
    """The best validation value of the run's full evaluations."""
    return max(line[metric] for line in records(run.folder) if line.get("part") == "validation")


def summary(run: Run) -> dict[str, Any]:
    """The run's test metrics, seconds of its median epoch, peak memory in MiB, best epoch from 1, and conditions."""
    lines = records(run.folder)
    epochs, final = [line for line in lines if "epoch" in line], lines[-1]
    clock = [0.0, *(line["seconds"] for line in epochs)]
    metric = "ndcg@10"
    scored = [line for line in epochs if metric in line]
    return {
        "test": final["results"][final["model"]],
        "seconds_per_epoch": statistics.median(b - a for a, b in itertools.pairwise(clock))
        if epochs
        else None,
        "memory_mb": final.get("peak_gpu_mb", final.get("peak_rss_mb")),
        "best_epoch": 1 + max(scored, key=lambda line: line[metric])["epoch"] if scored else None,
        "epochs": len(epochs),
        "split_hash": final.get("split_hash"),
        "conditions": final.get("conditions"),
    }
