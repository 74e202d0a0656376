"""Time and memory of cross-entropy over a whole catalogue, beside the matrix products it must do.

    python benchmarks/catalogue_loss.py --tokens 14000 --items 700000 --dim 64

One run times both: the loss with its gradients, and the three products (logits, gradient of the hidden states, gradient
of the items) in blocks of the shape that suits the processor's cache, with nothing between them. Peak memory is the
growth of the process's resident memory over the inputs, less the gradients. The last line is one JSON object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import records
import torch
from torch import Tensor

from generative_recommenders.config.registry import LOSSES
from generative_recommenders.objectives.losses.catalogue import CatalogueLoss

_BLOCK, _TILE = 256, 4096  # tokens and items of a product: 4 MB of logits


class Seconds(NamedTuple):
    """Of the clock, and of all processor cores (threads that spin while waiting included)."""

    wall: float
    processor: float


class PeakMemory:
    """Largest resident memory of this process, sampled every 10 ms while the context is open; bytes over its start."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = records.resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, records.resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, records.resident_bytes())

    @property
    def growth(self) -> int:
        return self.peak - self.start


def products(hidden: Tensor, item_weight: Tensor) -> None:
    """The three matrix products, block by block."""
    by_hidden, by_items = torch.zeros_like(hidden), torch.zeros_like(item_weight)
    memory = hidden.new_empty(_BLOCK * _TILE)
    for start in range(0, len(hidden), _BLOCK):
        h, dh = hidden[start : start + _BLOCK], by_hidden[start : start + _BLOCK]
        for first in range(0, len(item_weight), _TILE):
            w = item_weight[first : first + _TILE]
            logits = torch.mm(h, w.t(), out=memory[: len(h) * len(w)].view(len(h), len(w)))
            dh.addmm_(logits, w)
            by_items[first : first + _TILE].addmm_(logits.t(), h)


def measure(name: str, tokens: int, items: int, dim: int) -> dict[str, float | int | str]:
    """Seconds and peak bytes of one loss with gradients; seconds of the products, half before, half after."""
    torch.manual_seed(0)
    hidden = (torch.randn(tokens, dim) / dim**0.5).requires_grad_()
    item_weight = torch.randn(items, dim).requires_grad_()
    positives = torch.randint(0, items, (tokens,))
    loss = LOSSES[name].make()
    loss(hidden[:64], item_weight[:_TILE], positives[:64] % min(_TILE, items)).sum.backward()
    hidden.grad = item_weight.grad = None

    half = slice(0, tokens // 2), slice(tokens // 2, tokens)
    with torch.no_grad():
        before = timed(lambda: products(hidden[half[0]], item_weight))
    with PeakMemory() as memory:
        took = timed(lambda: loss(hidden, item_weight, positives).mean().backward())
    with torch.no_grad():
        after = timed(lambda: products(hidden[half[1]], item_weight))
    needed = Seconds(before.wall + after.wall, before.processor + after.processor)
    gradient_bytes = 4 * dim * (tokens + items)
    return {
        "loss": name,
        "tokens": tokens,
        "items": items,
        "dim": dim,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "seconds": round(took.wall, 3),
        "products_seconds": round(needed.wall, 3),
        "ratio": round(took.wall / needed.wall, 3),
        "processor_ratio": round(took.processor / needed.processor, 3),
        "peak_mb_beyond_inputs_and_gradients": round((memory.growth - gradient_bytes) / 1e6, 1),
    }


def timed(work: Callable[[], object]) -> Seconds:
    """Seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def main() -> None:
    parser = records.parser_of(__doc__, tokens=14_000, items=700_000, dim=64, threads=torch.get_num_threads())
    parser.add_argument(
        "--loss",
        choices=sorted(name for name in LOSSES.names() if issubclass(LOSSES[name].make, CatalogueLoss)),
        default="CE",
    )
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    records.finish(measure(flags.loss, flags.tokens, flags.items, flags.dim), flags.output)


if __name__ == "__main__":
    main()
