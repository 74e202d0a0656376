"""Conversions between jagged tokens and padded rectangles by fbgemm and by plain torch, in microseconds a call.

    python benchmarks/jagged.py --repeats=200                # where fbgemm is installed

The last line is one JSON object. For every shape: float32 tokens ``[T, D]`` padded and taken back, forward and
backward; and what every batch asks of its layout, forward alone: the cells of its tokens (int64 ``[B, N]`` to ``[T]``)
and their positions. Both ways are timed by turns; a number is a median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import records

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.jagged import jagged_to_padded, padded_to_jagged, row_positions

SHAPES = ((128, 50, 50), (128, 200, 64), (128, 200, 256))


def conversions(rows: int, columns: int, width: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name, for sequences of 1 to N tokens."""
    lengths = torch.randint(1, columns + 1, (rows,))
    tokens = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    values, d_values = (torch.randn(tokens, width, device=device) for _ in range(2))
    dense, d_dense = (torch.randn(rows, columns, width, device=device) for _ in range(2))
    values.requires_grad_()
    dense.requires_grad_()
    cells = torch.arange(rows * columns, device=device).view(rows, columns)

    def to_padded() -> object:
        return torch.autograd.grad(jagged_to_padded(values, offsets, columns), values, d_dense)

    def to_jagged() -> object:
        return torch.autograd.grad(padded_to_jagged(dense, offsets, tokens), dense, d_values)

    return {
        "jagged_to_padded": to_padded,
        "padded_to_jagged": to_jagged,
        "cells_of_tokens": lambda: padded_to_jagged(cells, offsets, tokens),
        "row_positions": lambda: row_positions(offsets, tokens),
    }


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start)


def compare(call: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {"fbgemm": [], "torch": []}
    for _ in range(repeats + 3):
        times["fbgemm"].append(microseconds(call, device))
        with dispatch.references():
            times["torch"].append(microseconds(call, device))
    medians = {name: statistics.median(each[3:]) for name, each in times.items()}
    return {name: round(value, 1) for name, value in medians.items()} | {
        "torch_over_fbgemm": round(medians["torch"] / medians["fbgemm"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if not dispatch.fbgemm_runs_on(device.type):
        raise SystemExit(f"fbgemm does not run on {device.type} here: there is nothing to compare")
    results = {}
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        calls = conversions(*shape, device)
        results[name] = {each: compare(call, args.repeats, device) for each, call in calls.items()}
    setup = {name: value for name, value in vars(args).items() if name != "output"}
    records.finish({"setup": setup, "results": results}, args.output)


if __name__ == "__main__":
    main()
