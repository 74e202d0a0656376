"""Conversions between jagged tokens and padded rectangles by fbgemm and by plain torch, in microseconds a call.

    python benchmarks/jagged.py --repeats=200                # where fbgemm is installed

The last line is one JSON object. For every shape: float32 tokens ``[T, D]`` padded and taken back, forward and
backward; and what every batch asks of its layout, forward alone: the cells of its tokens (int64 ``[B, N]`` to ``[T]``).
Both ways are timed by turns; a number is a median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import records
import timing
import torch

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.jagged import (
    jagged_to_padded,
    jagged_to_padded_reference,
    padded_to_jagged,
    padded_to_jagged_reference,
)

Function = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
SHAPES = ((128, 50, 50), (128, 200, 64), (128, 200, 256))


def measure(rows: int, columns: int, width: int, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Both ways of each conversion, for sequences of 1 to N tokens."""
    lengths = torch.randint(1, columns + 1, (rows,))
    tokens = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    values, d_values = (torch.randn(tokens, width, device=device) for _ in range(2))
    dense, d_dense = (torch.randn(rows, columns, width, device=device) for _ in range(2))
    values.requires_grad_()
    dense.requires_grad_()
    cells = torch.arange(rows * columns, device=device).view(rows, columns)

    def calls(to_padded: Function, to_jagged: Function) -> dict[str, Callable[[], object]]:
        return {
            "jagged_to_padded": lambda: torch.autograd.grad(to_padded(values, offsets, columns), values, d_dense),
            "padded_to_jagged": lambda: torch.autograd.grad(to_jagged(dense, offsets, tokens), dense, d_values),
            "cells_of_tokens": lambda: to_jagged(cells, offsets, tokens),
        }

    by_fbgemm = calls(jagged_to_padded, padded_to_jagged)
    plain = calls(jagged_to_padded_reference, padded_to_jagged_reference)
    return {name: compare(by_fbgemm[name], plain[name], repeats) for name in plain}


def compare(by_fbgemm: Callable[[], object], plain: Callable[[], object], repeats: int) -> dict[str, float]:
    times = timing.by_turns({"fbgemm": by_fbgemm, "torch": plain}, repeats, warmup=3)
    medians = {name: 1e6 * statistics.median(each) for name, each in times.items()}
    rounded = {name: round(value, 1) for name, value in medians.items()}
    return rounded | {"torch_over_fbgemm": round(medians["torch"] / medians["fbgemm"], 2)}


def main() -> None:
    parser = records.parser_of(__doc__, repeats=200, seed=0, threads=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if not dispatch.fbgemm_runs_on(device.type):
        raise SystemExit(f"fbgemm does not run on {device.type} here: there is nothing to compare")
    results = {"x".join(map(str, shape)): measure(*shape, device, args.repeats) for shape in SHAPES}
    setup = {name: value for name, value in vars(args).items() if name != "output"}
    records.finish({"setup": setup, "results": results}, args.output)


if __name__ == "__main__":
    main()
