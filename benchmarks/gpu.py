"""GPU benchmark of training: parity with a CPU, waits within a step, step times, memory; the last line is JSON.

    python benchmarks/gpu.py --output=benchmarks/results/gpu.json
    python benchmarks/gpu.py --device=cpu --quick         # does it run at all

One call measures everything, some three minutes on an H200. A part that fails is reported and the rest continues; parts
that find no time left in ``--seconds`` are left out. Data are made in memory, with the lengths of ML-1M and of Amazon
Books, so that nothing but the program, torch and numpy is needed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import records
import torch
from gpu_setup import (
    BOOKS_CONFIG,
    BOOKS_ITEMS,
    Bench,
    books,
    guarded,
    made_dataset,
    make_trainer,
    movie_settings,
    movies,
    settings_of,
    table,
    timed_steps,
)

from generative_recommenders.build.parts import Catalogue, build_task
from generative_recommenders.config.registry import LOSSES
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.data.loader import SequenceLoader
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.objectives.losses import catalogue, sampled
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from generative_recommenders.ops import dispatch
from generative_recommenders.training.step import TrainingStep
from generative_recommenders.training.trainer import Trainer, set_precision

PARITY_TOLERANCE = 1e-3
EPOCHS = 100
"""Epochs of a published run."""


# -- parts: each takes the bench and gives figures by name --------------------------------------------------------


def copy_rate(bench: Bench) -> float:
    """Bytes a second, those read and those written."""
    source = torch.randn(1 << 18 if bench.quick else 1 << 29, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 10)


def device_rates(bench: Bench) -> dict[str, Any]:
    """Rates that the others are held against."""
    size = 256 if bench.quick else 8192
    rates = {"copy_gb_s": copy_rate(bench) / 1e9}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x = torch.randn(size, size, device=bench.device, dtype=dtype)
        rates[f"{name}_tflops"] = 2 * size**3 / bench.seconds(lambda x=x: x @ x, 5) / 1e12
    return {name: round(value, 3) for name, value in rates.items()}


def parity(bench: Bench) -> dict[str, Any]:
    """Every encoder and loss, without dropout and TF32: relative differences from a CPU of the loss and of the worst
    gradient."""
    dataset = made_dataset(np.array([3, 40, 1, 17, 60, 25, 9, 33] * 2), 500)
    kinds = (sampled.SampledLoss, catalogue.CatalogueLoss, ScalableCrossEntropyLoss)
    losses = [part.name for part in LOSSES.parts() if issubclass(part.make, kinds)]
    cases: dict[str, tuple[str, list[str]]] = {encoder: (encoder, []) for encoder in bench.encoders()}
    cases |= {f"SASRec, {name}": ("SASRec", [f"train_fn.loss_module = '{name}'"]) for name in losses}
    cases |= {
        f"SASRec, {sharing}": ("SASRec", [f"train_fn.negatives_sharing = '{sharing}'"])
        for sharing in ("block", "batch")
    }
    found: dict[str, Any] = {}
    for name, (encoder, bindings) in list(cases.items())[: 4 if bench.quick else None]:
        settings = movie_settings(encoder, bench, "train_fn.max_sequence_length = 48", *bindings)
        found[name] = guarded(differences_from_cpu, settings, dataset, bench)
    bad = [name for name, value in found.items() if isinstance(value, str) or not max(value) < PARITY_TOLERANCE]
    return {"tolerance": PARITY_TOLERANCE, "failed": bad, "differences": found}


def differences_from_cpu(settings: RunSettings, dataset: SequenceDataset, bench: Bench) -> list[float]:
    """Relative differences of the loss, and of the gradient that differs most."""
    split = make_split(dataset, "leave_one_out")
    facts = Catalogue.of(dataset, split.train_stops)
    length = settings.data.max_sequence_length
    batch = next(SequenceLoader(dataset, split.train_stops, length, len(dataset.lengths), seed=1).epoch(0))
    set_precision(settings, bench.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = []
    for device in (torch.device("cpu"), bench.device):
        torch.manual_seed(0)  # parameters are drawn on the CPU
        task = build_task(settings, facts, Collectives(device))
        task.eval()  # no dropout
        for part in task.modules():
            if isinstance(part, ScalableCrossEntropyLoss):
                part.register_forward_pre_hook(directions_of_a_cpu, with_kwargs=True)
        output = task.loss(batch, step=0)
        loss = output.sum / output.weight + sum(output.auxiliary.values())
        loss.backward()
        gradients = {n: p.grad.double().cpu() for n, p in task.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach().double().cpu(), **gradients})
    reference, found = results
    assert reference.keys() == found.keys()
    scale = max(float(x.norm()) for x in reference.values())
    relative = {
        name: float((found[name] - x).norm() / x.norm().clamp(min=1e-4 * scale)) for name, x in reference.items()
    }
    return [float(f"{value:.2e}") for value in (relative.pop("loss"), max(relative.values()))]


def directions_of_a_cpu(
    loss: ScalableCrossEntropyLoss, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives the loss its normal numbers: it draws on the states' device, whose generators differ."""
    length, width = arguments[0].shape
    shape = (length, loss.n_buckets) if loss.mix_x else (loss.n_buckets, width)
    normals = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return arguments, {**named, "normals": normals.to(arguments[0].device)}


def no_waiting(bench: Bench) -> dict[str, Any]:
    """Whether a step of each encoder waits for the device: "no", or the operation that does."""
    dataset = movies(bench)

    def step(encoder: str) -> str:
        trainer = make_trainer(movie_settings(encoder, bench), dataset, bench)
        batches = trainer.loader.epoch(0)
        trainer.model.train()
        for _ in range(2):  # kernels are compiled, steps captured
            batch = next(batches)
            trainer.run_step(batch)
            trainer.run_step(batch)
        bench.wait()
        try:
            if bench.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            trainer.run_step(batch)
            launch_by_launch(trainer)
            trainer.run_step(batch)
        finally:
            if bench.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return "no"

    return {encoder: guarded(step, encoder) for encoder in bench.encoders()}


def without_dropout(encoder: str, bench: Bench) -> RunSettings:
    rates = {"SASRec": "sasrec_encoder.ffn_dropout_rate", "HSTU-large": "hstu_encoder.linear_dropout_rate"}
    return movie_settings(encoder, bench, "train_fn.dropout_rate = 0.0", f"{rates[encoder]} = 0.0")


def captured_steps(bench: Bench) -> dict[str, Any]:
    """Steps by CUDA graphs and the same kernel by kernel, without dropout: the greatest relative difference of the
    losses."""
    dataset = movies(bench)

    def difference(encoder: str) -> float:
        settings = without_dropout(encoder, bench)
        captured, plain = (make_trainer(settings, dataset, bench) for _ in range(2))
        launch_by_launch(plain)
        found = []
        for batch, _ in zip(plain.loader.epoch(0), range(30)):
            ours, theirs = (float(each.run_step(batch).loss) for each in (captured, plain))
            found.append(abs(ours - theirs) / theirs)
        return float(f"{max(found):.2e}")

    return {encoder: guarded(difference, encoder) for encoder in ("SASRec", "HSTU-large")}


def launch_by_launch(trainer: Trainer) -> None:
    """No CUDA graphs in its steps."""
    trainer.step = TrainingStep(trainer.task, trainer.step.optimizer, trainer.collectives)


def training_steps(bench: Bench) -> dict[str, Any]:
    """Milliseconds of a step of each encoder at ML-1M's shape, published configuration (TF32), batches made in
    a thread: kernel by kernel, and as the trainer does it, by CUDA graphs where it can."""
    dataset, found = movies(bench), {}

    def measured(encoder: str, plain: bool) -> dict[str, Any]:
        trainer = make_trainer(movie_settings(encoder, bench), dataset, bench)
        if plain:
            launch_by_launch(trainer)
        return timed_steps(trainer, encoder, replace(bench, profiles=None) if plain else bench)

    for encoder in bench.encoders():
        found[encoder] = guarded(measured, encoder, False)
        found[f"{encoder}, no graphs"] = guarded(measured, encoder, True)
    return found


def exact_evaluation(bench: Bench) -> dict[str, Any]:
    """Exact ranks of all users of ML-1M's size, by HSTU-large and by SASRec."""
    dataset, found = movies(bench), {}
    for encoder in ("SASRec", "HSTU-large"):
        trainer = make_trainer(movie_settings(encoder, bench, "train_fn.eval_batch_size = 2048"), dataset, bench)
        seconds = bench.seconds(lambda t=trainer: t.evaluation.validation(t.model), 2)
        found[encoder] = {
            "seconds": round(seconds, 3),
            "users": dataset.num_users,
            "peak_mb": bench.peak_mb(),
        }
    return found


def epochs(bench: Bench) -> dict[str, Any]:
    """HSTU-large, published configuration, exact evaluation after every epoch: 100 epochs, or as many as fit."""
    dataset = movies(bench)

    def train(count: int) -> tuple[Any, float]:
        bindings = [
            f"train_fn.num_epochs = {count}",
            "train_fn.eval_batch_size = 2048",
            "train_fn.full_eval_every_n = 1",
        ]
        trainer = make_trainer(movie_settings("HSTU-large", bench, *bindings), dataset, bench)
        started = time.perf_counter()
        trainer.train()
        bench.wait()
        return trainer, time.perf_counter() - started

    _, first = train(1)  # kernels are compiled here
    _, third = train(3)
    one = max((third - first) / 2, third / 20)
    count = 2 if bench.quick else int(min(bench.epochs, max(1, (bench.left() - 20) / one)))
    trainer, seconds = train(count)
    history = trainer.progress.history
    result = {
        "epochs_measured": count,
        "seconds": round(seconds, 2),
        "training_seconds": round(trainer.progress.seconds, 2),
        "first_and_last_train_loss": [round(history[i]["train_loss"], 4) for i in (0, -1)],
        "peak_mb": bench.peak_mb(),
    }
    if count < EPOCHS:
        result[f"extrapolated_to_{EPOCHS}_epochs_seconds"] = round(seconds * EPOCHS / count, 1)
    return result


def catalogue_losses(bench: Bench) -> dict[str, Any]:
    """Softmax cross-entropy over all items, forward and backward, in TF32: by kernels that write no logits, and by
    blocks.

    multiples_of_the_products: time over that of five products of these sizes at the card's rate; memory beside the
    operands.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    shapes = {
        "25,600 tokens, 3,706 items of 50": (25_600, 3706, 50),
        "12,800 tokens, 26,744 items of 256": (12_800, 26_744, 256),
        "1,024 tokens, 801,350 items of 64": (1024, BOOKS_ITEMS, 64),
    }
    if bench.quick:
        shapes = {"70 tokens, 500 items of 50": (70, 500, 50)}
    loss, found = catalogue.CE(), {}

    def measured(tokens: int, items: int, width: int, kernels: bool) -> dict[str, Any]:
        hidden = torch.randn(tokens, width, device=bench.device, requires_grad=True)
        weight = (torch.randn(items, width, device=bench.device) / width).requires_grad_()
        positives = torch.randint(items, (tokens,), device=bench.device)

        def work() -> float:
            no_kernels = mock.patch.object(dispatch, "takes_kernels", return_value=False)
            with contextlib.nullcontext() if kernels else no_kernels:
                output = loss(hidden, weight, positives)
            torch.autograd.grad(output.sum, (hidden, weight))
            return output.sum.detach()

        size = 256 if bench.quick else 4096
        x = torch.randn(size, size, device=bench.device)
        rate = 2 * size**3 / bench.seconds(lambda: x @ x, 5)
        bench.peak_mb()
        before = torch.cuda.memory_allocated() / 2**20 if bench.device.type == "cuda" else 0.0
        seconds = bench.seconds(work, 5)
        return {
            "ms": round(1e3 * seconds, 3),
            "multiples_of_the_products": round(seconds * rate / (10 * tokens * items * width), 1),
            "memory_mb": round((bench.peak_mb() or 0.0) - before, 1),
            "loss": round(float(work()) / tokens, 4),
        }

    for name, shape in shapes.items():
        found[name] = guarded(measured, *shape, True)
        found[f"{name}, blocks"] = guarded(measured, *shape, False)
    return found


def books_steps(bench: Bench) -> dict[str, Any]:
    """A step over 801,350 items of width 64, 128 users: published negatives (512 a position) and 512 a block of 64.

    table_passes_in_that_time: how often the card reads or writes the table at its copy rate; dense AdamW alone asks for
    7.
    """
    dataset, found, rate = books(bench), {}, copy_rate(bench)

    def measured(name: str, bindings: list[str]) -> dict[str, Any]:
        trainer = make_trainer(settings_of(BOOKS_CONFIG, bindings, bench), dataset, bench)
        result = timed_steps(trainer, f"books-{name.replace(', ', '-')}", bench, steps=40)
        table = trainer.model.items.table.nbytes
        passes = result["step_ms"] / 1e3 * rate / table
        return {**result, "table_mb": round(table / 2**20, 1), "table_passes_in_that_time": round(passes, 1)}

    shared = ["train_fn.negatives_sharing = 'block'", "train_fn.negatives_block_size = 64"]
    for name, bindings in (
        ("block, rowwise_adagrad", [*shared, "train_fn.optimizer = 'rowwise_adagrad'"]),
        ("block, lazy_adamw", [*shared, "train_fn.optimizer = 'lazy_adamw'"]),
        ("block, adamw", shared),
        ("position, rowwise_adagrad", ["train_fn.optimizer = 'rowwise_adagrad'"]),
        ("position, adamw", []),
    ):
        found[name] = guarded(measured, name, bindings)
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "rates": device_rates,
    "parity": parity,
    "waiting": no_waiting,
    "graphs": captured_steps,
    "steps": training_steps,
    "books": books_steps,
    "catalogue losses": catalogue_losses,
    "evaluation": exact_evaluation,
    "epochs": epochs,
}


def main() -> None:
    parser = records.parser_of(__doc__, epochs=EPOCHS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=360.0, help="no part begins after so many")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="what to measure")
    parser.add_argument("--profiles", type=Path, help="folder for tables of the slowest kernels")
    parser.add_argument("--output", type=Path, help="file for the JSON")
    flags = parser.parse_args()
    until = time.perf_counter() + flags.seconds
    bench = Bench(torch.device(flags.device), flags.quick, flags.epochs, until, flags.profiles)
    for folder in (flags.profiles, flags.output and flags.output.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if flags.device == "cuda" else "CPU"
    results: dict[str, Any] = {"machine": {"card": card, **records.stamp()}}
    for name in flags.parts:
        started = time.perf_counter()
        bench.peak_mb()
        results[name] = guarded(PARTS[name], bench) if bench.left() > 0 else "no time left"
        print(f"{name}: {time.perf_counter() - started:.1f} s\n{table({name: results[name]})}", flush=True)
        if flags.output:
            flags.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
