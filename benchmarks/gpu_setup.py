"""Shared set-up of the parts of `gpu.py`: a clock, made data, settings and trainers."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from made_data import dataset_of, movie_lengths, zipf_items

from generative_recommenders.config import gin as gin_registry
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import prefetch
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.training.trainer import Trainer

ENCODERS = {
    "SASRec": ("sasrec-sampled-softmax-n128-final", []),
    "HSTU": ("hstu-sampled-softmax-n128-final", []),
    "HSTU-large": ("hstu-sampled-softmax-n128-large-final", []),
    "DiffTransformer": ("sasrec-sampled-softmax-n128-final", ["train_fn.main_module = 'DiffTransformer'"]),
    "TwoTower": (
        "sasrec-sampled-softmax-n128-final",
        ["train_fn.main_module = 'TwoTower'", "train_fn.negatives_sharing = 'block'"],
    ),
    "Transformer": ("sasrec-sampled-softmax-n128-final", ["train_fn.main_module = 'Transformer'"]),
    "FuXi": ("fuxi-sampled-softmax-n128-final", []),
    "LiGR": ("ligr-sampled-softmax-n128", ["train_fn.enable_tf32 = True"]),
    "LiGR, 128 wide, no TF32": (
        "ligr-sampled-softmax-n128",
        ["train_fn.enable_tf32 = False", "train_fn.item_embedding_dim = 128"],
    ),
    "SASRec-MoL": ("sasrec-mol-sampled-softmax-n128-8x4x64-rails-final", []),
}
"""Published configurations of ML-1M, with the bindings that make another encoder of one."""
QUICK = ("SASRec", "HSTU-large")
"""Those that ``--quick`` runs."""
BOOKS_ITEMS, BOOKS_CONFIG = 801_350, "configs/amzn-books/sasrec-sampled-softmax-n512-final.gin"


@dataclass(frozen=True)
class Bench:
    """What is measured and how much of it.

    quick: tiny sizes. epochs: to train, at most. until: `time.perf_counter` of the end. profiles: folder of the tables
    of the slowest kernels, or None.
    """

    device: torch.device
    quick: bool
    epochs: int
    until: float
    profiles: Path | None

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Of one call, the mean of some after one that is not counted."""
        work()
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def peak_mb(self) -> float | None:
        """Most memory of the device in use since the last call."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 1)

    def encoders(self) -> tuple[str, ...]:
        return QUICK if self.quick else tuple(ENCODERS)

    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()


def made_dataset(lengths: np.ndarray, num_items: int) -> SequenceDataset:
    """Histories of these lengths ``[U]``, of Zipf items."""
    generator = np.random.default_rng(0)
    return dataset_of(lengths, zipf_items(lengths.sum(), num_items, generator), num_items, generator)


def movies(bench: Bench) -> SequenceDataset:
    """ML-1M's users, items and lengths."""
    users, items = (48, 300) if bench.quick else (6040, 3706)
    lengths = movie_lengths(users, np.random.default_rng(0))
    return made_dataset(lengths.clip(max=60) if bench.quick else lengths, items)


def books(bench: Bench) -> SequenceDataset:
    """Amazon Books' items and lengths: 5 to 50 events, mean about 8, of which two are held out."""
    users, items = (48, 2000) if bench.quick else (20_000, BOOKS_ITEMS)
    drawn = 5 + np.random.default_rng(0).exponential(4.0, users)
    return made_dataset(np.minimum(drawn, 52).astype(np.int64), items)


def settings_of(config: str, bindings: list[str], bench: Bench) -> RunSettings:
    quick = ["train_fn.local_batch_size = 16", "train_fn.max_sequence_length = 20"] if bench.quick else []
    return gin_registry.load_settings([records.ROOT / config], [*bindings, *quick])


def movie_settings(encoder: str, bench: Bench, *bindings: str) -> RunSettings:
    config, own = ENCODERS[encoder]
    return settings_of(f"configs/ml-1m/{config}.gin", [*own, *bindings], bench)


def make_trainer(settings: RunSettings, dataset: SequenceDataset, bench: Bench) -> Trainer:
    split = make_split(dataset, settings.data.protocol)
    return Trainer(settings, dataset, split, Collectives(bench.device))


def timed_steps(trainer: Trainer, name: str, bench: Bench, warmup: int = 10, steps: int = 60) -> dict[str, Any]:
    """Time of steps that follow each other, memory, and, where asked for, a table of the slowest kernels."""
    trainer.model.train()
    batches = prefetch(itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count())), 8)
    trainer.run_step(next(batches))  # kernels are compiled
    one = bench.seconds(lambda: trainer.run_step(next(batches)), 2)
    steps = 2 if bench.quick else max(5, min(steps, int(3.0 / one)))
    for _ in range(3 * steps):  # every number of tokens is met twice, and captured
        trainer.run_step(next(batches))
    bench.wait()
    bench.peak_mb()
    tokens, started = 0, time.perf_counter()
    for _ in range(steps):
        loaded = next(batches)
        trainer.run_step(loaded)
        tokens += loaded.global_tokens
    bench.wait()
    seconds = time.perf_counter() - started
    result = {
        "step_ms": round(1e3 * seconds / steps, 3),
        "tokens_per_second": round(tokens / seconds),
        "peak_mb": bench.peak_mb(),
    }
    if bench.profiles is not None:
        result |= profiled(trainer, batches, bench.profiles / f"{name}.txt", bench)
    batches.close()
    return result


def profiled(trainer: Trainer, batches: Any, path: Path, bench: Bench, steps: int = 5) -> dict[str, Any]:
    """Kernels and device time of a step; the slowest ones go to a file."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            trainer.run_step(next(batches))
        bench.wait()
    events = profiler.key_averages()
    columns = ["self_device_time_total", "self_cpu_time_total"]
    path.write_text("\n".join(events.table(sort_by=c, row_limit=40, max_name_column_width=70) for c in columns))
    kernels = [e for e in events if e.self_device_time_total > 0 and e.device_type != torch.autograd.DeviceType.CPU]
    return {
        "kernels_a_step": round(sum(e.count for e in kernels) / steps),
        "device_ms_a_step": round(sum(e.self_device_time_total for e in kernels) / steps / 1e3, 3),
    }


def guarded(work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work gives; or its error in one line, with the innermost place of the program that it came through."""
    try:
        return work(*arguments)
    except Exception as error:
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "generative_recommenders" in f.filename]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def table(results: dict[str, Any]) -> str:
    """The figures, a line each."""

    def lines(value: Any, name: str) -> list[str]:
        if isinstance(value, dict):
            return [line for key, each in value.items() for line in lines(each, f"{name} {key}".strip())]
        return [f"{name:<58} {value}"]

    return "\n".join(lines(results, ""))
