"""Final report of a run: the model beside two baselines, the data, and where everything is."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.splits import Split
from generative_recommenders.data.statistics import tie_lines
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives

COLUMNS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr")
"""Metrics that tables, curves and log lines show."""


def results_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Text table: one line a method, one column a metric."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>10}" for name in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{values[c]:>10.4f}" for c in COLUMNS) for name, values in rows.items()]
    return "\n".join(lines)


def model_rows(
    settings: RunSettings, metrics: Mapping[str, float], high_rated: Mapping[str, float]
) -> dict[str, Mapping[str, float]]:
    """The model's rows of the table: all targets, then the highly rated ones where there are any."""
    rows = {settings.model.main_module: metrics}
    if high_rated:
        rows[f"{settings.model.main_module}, targets rated {settings.evaluation.rating_threshold:g}+"] = high_rated
    return rows


def curve_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `plot_curves`, epochs counted from 1: the loss, and the table's metrics where the evaluation was a full
    one."""
    rows = []
    for epoch in history:
        names = ("train_loss", *COLUMNS) if epoch.get("full", True) else ("train_loss",)
        rows.append({"epoch": epoch["epoch"] + 1, **{name: epoch[name] for name in names if name in epoch}})
    return rows


def list_metrics_lines(lists: Mapping[str, float]) -> list[str]:
    """Names and values of the metrics of top-k lists, one line each; no lines where no lists were made."""
    if not lists:
        return []
    return ["", "  ".join(lists), "  ".join(f"{value:>{len(name)}.4f}" for name, value in lists.items())]


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in MiB: ``peak_rss_mb``, and ``peak_gpu_mb`` of torch's tensors where a GPU was
    used."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Of a started program that one is at least what the program that started it took; Linux tells its own, too.
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kibibytes = int(status["VmHWM"].split()[0]) if "VmHWM" in status else kibibytes
    peaks = {"peak_rss_mb": round(kibibytes / 2**10)}
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peaks["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peaks


def environment(collectives: Collectives) -> dict[str, str]:
    """The run's device, number of processes and versions."""
    device = torch.device(collectives.device)
    on_gpu = device != torch.device("cpu")
    return {
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU, threads in each process: {torch.get_num_threads()}",
        "processes": str(collectives.world_size),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def data_summary(dataset: SequenceDataset, split: Split) -> str:
    counts = "  ".join(f"{name} {value:,}" for name, value in split.counts.items())
    lines = [
        f"data {dataset.manifest.name}: {dataset.num_users:,} users  {dataset.num_items:,} items  "
        f"{dataset.num_events:,} events",
        f"split {split.protocol} {split.hash}: {counts}",
        *tie_lines(dataset.manifest),
    ]
    return "\n".join(lines)


def final_report(
    rows: Mapping[str, Mapping[str, float]],
    dataset: SequenceDataset,
    split: Split,
    conditions: str,
    best_epoch: int | None,
    folder: Path,
    checkpoint: Path | None,
    lists: Mapping[str, float],
) -> str:
    """Text that a run prints at its end: table, metrics of lists, data, and the places of its files."""
    chosen = "after the last step" if best_epoch is None else f"epoch {best_epoch + 1}, the best on validation"
    if split.protocol == "paper":
        chosen = "the last epoch; protocol paper scores the test item every epoch, as the HSTU authors' code does"
    places = {
        "checkpoint": checkpoint or "none",
        "resolved config": folder / "resolved.gin",
        "TensorBoard log": folder / "tensorboard",
        "curves": curves if (curves := folder / "curves.png").exists() else "none",
    }
    lines = [
        "",
        f"test, full catalogue, {conditions}; model: {chosen}",
        results_table(rows),
        *list_metrics_lines(lists),
        "",
        data_summary(dataset, split),
        *(f"{name}: {place}" for name, place in places.items()),
    ]
    return "\n".join(lines)
