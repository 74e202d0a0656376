"""Processes for tests, forked from a server that has the slow imports done: one starts in a moment."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

SLOW_IMPORTS = [
    "torch",
    "torch.distributed",
    "pyarrow.parquet",
    "safetensors.torch",
    "pytest",
    "absl.logging",
]


def quick_start() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context
