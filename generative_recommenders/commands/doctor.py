"""Machine diagnostics (versions, device, memory, speed) and a short self-test of a few training steps."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import generative_recommenders
from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.commands.program import COMMAND, exit_code
from generative_recommenders.config.gin import ROOT
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.preparation.prepare import prepare, prepared_names
from generative_recommenders.data.sources.public import resolve
from generative_recommenders.data.sources.synthetic_books import SyntheticBooksSettings
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.process_group import process_device
from generative_recommenders.ops.dispatch import fbgemm_fault

PACKAGES = ("numpy", "pyarrow", "polars", "pandas", "pydantic", "gin-config", "safetensors")
EXTRAS = {
    "export": ("onnx", "onnxscript", "onnxruntime", "faiss-cpu"), "lightning": ("lightning",), "search": ("optuna",),
    "serve": ("fastapi", "uvicorn", "prometheus-client"), "spark": ("pyspark",),
}  # fmt: skip
LITTLE_DISK, LITTLE_MEMORY = 5, 4
"""GiB below which the doctor complains: the embedded example and a run of ML-1M take less."""
STEPS = 60
SEED = 7


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def product_rate(device: torch.device) -> float:
    """Measured rate of float32 matrix products, in 10^9 operations a second."""
    factors = dict(zip(("left", "right"), torch.randn(2, 1024, 1024, device=device)))
    timer = Timer("left @ right", globals=factors, num_threads=torch.get_num_threads())
    return 2 * 1024**3 / timer.blocked_autorange(min_run_time=0.3).median / 1e9


def memory() -> tuple[float, float]:
    """GiB of memory: all, and what is free for programs; NaN where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return float("nan"), float("nan")
    total, free = (int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return total, free


def self_test() -> tuple[float, float, float]:
    """Prepares 200 made readers and trains a small SASRec on them: loss of the first and last steps, seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        books = SyntheticBooksSettings(num_users=200, num_items=100)
        prepare(resolve("synthetic-books", data_root=root, synthetic=books, progress=False), root / "books")
        dataset = SequenceDataset.open(root / "books")
        stops = make_split(dataset).train_stops
        small = {"loss_module": "CE", "item_embedding_dim": 32, "max_sequence_length": 20}
        settings = RunSettings().bind({f"train_fn.{name}": value for name, value in small.items()})
        torch.manual_seed(SEED)
        task = build_task(settings, Catalogue.of(dataset, stops))
        optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
        loader, losses = SequenceLoader(dataset, stops, 20, 64, seed=SEED), []
        batches: Iterator = (batch for epoch in range(STEPS) for batch in loader.epoch(epoch))
        for step, batch in zip(range(STEPS), batches):
            loss = task.loss(batch, step).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses[0], losses[-1], time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Prints one screen; exit code 1 where something stands in the way of a run."""
    parser = argparse.ArgumentParser(prog=f"{COMMAND} doctor", description=__doc__)
    parser.add_argument("--data_root", default="data", help="where raw/ and prepared/ data sets lie")
    data_root = Path(parser.parse_args(argv).data_root)

    def run() -> int:
        complaints = []
        device = process_device()
        total, free = memory()
        disk = shutil.disk_usage(".")
        fault = fbgemm_fault("cuda" if torch.cuda.is_available() else "cpu")
        packages = "  ".join(f"{name} {version(name) or 'missing'}" for name in PACKAGES)
        extras = [f"{name} ({'yes' if all(map(version, needed)) else 'no'})" for name, needed in EXTRAS.items()]
        lines = [
            f"program    {generative_recommenders.__version__} at {Path(generative_recommenders.__file__).parent}",
            f"python     {platform.python_version()}, {platform.system()} {platform.machine()}; "
            f"torch {torch.__version__}",
            f"packages   {packages}",
            f"extras     {'  '.join(extras)}",
            f"configs    {len(list((ROOT / 'configs').rglob('*.gin')))} in {ROOT / 'configs'}",
            f"prepared   {', '.join(prepared_names(data_root)) or 'nothing'} in {data_root / 'prepared'}",
            f"device     {device}" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            f"fbgemm     {'used' if fault is None else f'not used: {fault}'}",
            f"threads    {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} cores",
            f"memory     {free:.1f} of {total:.1f} GiB free",
            f"disk       {disk.free / 2**30:.1f} GiB free here",
            f"products   {product_rate(device):.0f} GFLOP/s in float32",
        ]
        if free < LITTLE_MEMORY:
            complaints.append(f"less than {LITTLE_MEMORY} GiB of memory are free")
        if disk.free < LITTLE_DISK * 2**30:
            complaints.append(f"less than {LITTLE_DISK} GiB of disk are free here")
        first, last, seconds = self_test()
        lines.append(f"self-test  loss {first:.2f} to {last:.2f} in {STEPS} steps, {seconds:.1f} s with preparation")
        if not last < first:
            complaints.append(f"the loss of {STEPS} training steps did not fall, from {first} to {last}")
        print("\n".join([*lines, *(f"problem    {each}" for each in complaints)]))
        print("all is well" if not complaints else f"{len(complaints)} problem(s)")
        return 1 if complaints else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
