"""Records of a run as its folder holds them: settings, epochs, steps, final numbers, machine and time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from generative_recommenders.checkpoint.store import Checkpoint, checkpoint_of_run
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.run.report.facts import Facts, read_facts


@dataclass(frozen=True)
class Run:
    """Records in a run's folder beside its model.

    epochs, steps: records of metrics.jsonl. final: the last one of all, or that of ``evaluation.json`` where it is of
    this checkpoint and its settings; empty without either. best_epoch: counted from 0, None where none was picked.
    """

    path: Path
    settings: RunSettings
    checkpoint: Checkpoint
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    final: dict[str, Any]
    facts: Facts | None

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def best_epoch(self) -> int | None:
        progress = self.checkpoint.state.get("progress", {})
        return progress.get("best_epoch") if isinstance(progress, dict) else None


def read_run(path: Path) -> Run:
    """UserError for a folder that is no run's, or that has no whole checkpoint."""
    checkpoint = checkpoint_of_run(path)
    records = read_records(path / "metrics.jsonl")
    final: dict[str, Any] = next((each for each in reversed(records) if each.get("part") == "final"), {})
    if not final and (path / "evaluation.json").is_file():
        final = next(iter(read_records(path / "evaluation.json", whole=True)), {})
        # Of changed settings, or from before the run was trained on, it is no result of this run.
        if final.get("bindings") or final.get("checkpoint") != checkpoint.path.name:
            final = {}
    settings = RunSettings.from_json(checkpoint.settings())
    return Run(
        path,
        settings,
        checkpoint,
        [each for each in records if "epoch" in each and "train_loss" in each],
        [each for each in records if "train/loss" in each and "step" in each],
        final,
        read_facts(path, settings.data.catalogue, checkpoint.path.name),
    )


def read_records(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a file of JSON, one a line or one alone; damaged ones are passed over."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate([text] if whole else text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _as_written(record):
            found.append(record)
        else:
            logging.warning("%s: record %d is not as a run writes it, and is passed over", path, number)
    return found


def _as_written(record: Any) -> bool:
    """Whether a record has the types that a run writes, which one that was edited by hand may not have."""
    if not isinstance(record, dict) or (record.get("part") == "final" and not record.keys() >= {"model", "results"}):
        return False
    rows = record.get("results", {})
    return (
        isinstance(rows, dict)
        and all(map(_of_numbers, [*rows.values(), *(record.get(name, {}) for name in ("spent", "list_metrics"))]))
        and isinstance(record.get("environment", {}), dict)
        and all(isinstance(record.get(name, ""), str) for name in ("model", "conditions"))
        and _of_numbers({name: value for name, value in record.items() if name in _NUMBERS or "@" in name})
    )


def _of_numbers(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(each, (int, float)) for each in table.values())


_NUMBERS = {"step", "epoch", "seconds", "train_loss", "mrr", "num_items", "peak_rss_mb", "peak_gpu_mb"}


PROTOCOLS = {
    "paper": (
        "Protocol paper: the last event of each user is the test target, and it was scored after every epoch, as in "
        "the HSTU authors' code. Such numbers do not compare with those of a validation split."
    ),
    "leave_one_out": (
        "Protocol leave_one_out: the last event of each user is the test target, scored once; the last but one picked "
        "the epoch. Such numbers do not compare with those whose epoch is read off the test target."
    ),
    "global_time": (
        "Protocol global_time: training ends at one moment for all users, and the targets are each user's first events "
        "after it; nothing later than a target was learned from."
    ),
}
TIE_ORDERS = {
    "file": "in the order of the file",
    "published": "in the order of the HSTU authors' unstable sort, which depends on the CPU",
    "random": "in an order drawn by a hash",
}


def conditions(run: Run, own: bool = True) -> list[str]:
    """The conditions of the numbers: lane, protocol, seen filter, ties, hidden or given time. own: with what the run
    itself says of its test."""
    ties = "file" if run.facts is None else run.facts.data["choices"].get("tie_order", "file")
    order = TIE_ORDERS.get(ties, ties)
    lines = [
        PROTOCOLS[run.settings.data.protocol],
        f"Events of one user and time are {order}; tables that break ties another way differ.",
    ]
    if own and run.final.get("conditions"):
        lines.append(f"Conditions of the test: {run.final['conditions']}.")
    candidates = "the whole catalogue"
    if (seen := run.settings.evaluation.seen_filter) != "none":
        candidates += f" but the seen items (seen filter {seen!r})"
    lines.append(
        f"Each target is ranked among {candidates}. Equal scores are ranked by item id. A rank is counted exactly, no "
        "candidates are sampled."
    )
    return lines


def machine(run: Run) -> list[tuple[str, str]]:
    """Throughput, memory and the machine, as names and values."""
    final, found = run.final, []
    rates = [each["train/tokens_per_second"] for each in run.steps if each.get("train/tokens_per_second")]
    if rates:
        found.append(("training tokens per second, median of the records", f"{float(np.median(rates)):,.0f}"))
    if final.get("seconds"):
        found.append(("seconds of training steps", f"{final['seconds']:,.1f}"))
        if final.get("step"):
            found.append(("steps per second", f"{final['step'] / final['seconds']:,.2f}"))
    for key, name in (
        ("peak_rss_mb", "peak memory of the main process"),
        ("peak_gpu_mb", "peak memory of tensors on its GPU"),
    ):
        if key in final:
            found.append((name, f"{final[key]:,} MiB"))
    return found + [(name, str(value)) for name, value in final.get("environment", {}).items()]


def spent(run: Run) -> dict[str, float]:
    """Seconds by what they were spent on; empty for runs that kept none."""
    kept = dict(run.final.get("spent", {}))
    if not kept:
        return {}
    waiting = kept.pop("waiting for batches", 0.0)
    steps = {
        "training steps": max(run.final.get("seconds", 0.0) - waiting, 0.0),
        "waiting for batches": waiting,
    }
    return {name: seconds for name, seconds in {**steps, **kept}.items() if seconds > 0}
