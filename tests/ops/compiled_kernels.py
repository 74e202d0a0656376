"""Compiles the kernels for a card that need not be there, and prints what a program of each takes of it, as JSON.

    python tests/ops/compiled_kernels.py 89 attention:128:ieee catalogue:64:tf32

An argument after the compute capability is a part (attention, catalogue, rows), a width and a precision: ieee or tf32
of float32, or bf16 for attention. Every launch is compiled, gradients included, and none is started. ``registers`` and
``stack`` are of a thread, ``stack`` the bytes that did not fit into registers; ``shared`` is the shared memory of a
program.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from generative_recommenders.ops import dispatch
from generative_recommenders.ops.attention.fused import Weights, fused_attention
from generative_recommenders.ops.attention.tiles import PairBias
from generative_recommenders.ops.embedding import bags_of_rows
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.ops.normalization_kernels import FusedLayerNorm
from generative_recommenders.ops.products import catalogue_kernels, kernels


def attention(width: int, dtype: torch.dtype) -> None:
    """Softmax, and pointwise with a bias by position and time; with dropout both."""
    layout, longest = jagged_layout(torch.tensor([40, 3, 0, 33]), 45), 40
    bias = PairBias(
        torch.zeros(89, requires_grad=True),
        torch.zeros(129, requires_grad=True),
        torch.zeros(4, longest, longest, dtype=torch.uint8),
    )
    q, k, v = (torch.zeros(layout.num_tokens, 2, width, dtype=dtype, requires_grad=True) for _ in range(3))
    fused_attention(q, k, v, layout, Weights(True, 0.3, dropout_rate=0.1)).sum().backward()
    fused_attention(q, k, v, layout, Weights(False, divisor=9.0, dropout_rate=0.1), bias).sum().backward()


def catalogue(width: int, dtype: torch.dtype) -> None:
    """One statistic with an excluded item, the other without."""
    hidden, weight = (torch.zeros(rows, width, dtype=dtype, requires_grad=True) for rows in (100, 700))
    catalogue_kernels.statistic(hidden, weight, torch.zeros(100, 1, dtype=torch.int64), True).sum().backward()
    catalogue_kernels.statistic(hidden, weight, None, False).sum().backward()


def rows(width: int, dtype: torch.dtype) -> None:
    """Products with sampled rows, their sums, and layer norm."""
    hidden, weight = (torch.zeros(count, width, dtype=dtype) for count in (9, 50))
    draws = torch.zeros(9, 128, dtype=torch.int64)
    grad = kernels.products(hidden, weight, draws)
    kernels.sums_of_rows(weight, draws, grad)
    kernels.sums_of_tokens(hidden, grad, *bags_of_rows(draws.flatten(), len(weight)))
    FusedLayerNorm.apply(hidden.requires_grad_(), 1e-8).sum().backward()


def resources(kernel: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return {"shared": kernel.metadata.shared, "registers": registers, "stack": stack}


def main() -> None:
    capability, launches = int(sys.argv[1]), [argument.split(":") for argument in sys.argv[2:]]
    card = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    driver.set_active(card)
    found: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        chosen = [f"{name}={options[name]}" for name in ("SOFTMAX", "EXPONENTIAL") if name in options]
        name = " ".join([f"{part}:{width}:{precision}", self.__name__, *chosen])
        found[name] = resources(kernel)
        return kernel

    with (
        mock.patch.object(JITFunction, "run", compiled),
        mock.patch.object(dispatch, "since_ampere", return_value=capability >= 80),
    ):
        for part, width, precision in launches:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            {"attention": attention, "catalogue": catalogue, "rows": rows}[part](int(width), dtype)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
