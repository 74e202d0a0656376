"""Incremental encoding of one more item against encoding from scratch, in milliseconds a batch.

    python benchmarks/incremental.py --rows=128 --length=200

The last line is one JSON object: for every encoder the median time of both, and the largest difference of their states.
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

from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.input_preprocessors import (
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.items import LocalEmbeddingModule
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import L2NormEmbeddingPostprocessor
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.types import SequentialFeatures

DIM, ITEMS, WINDOW = 50, 3416, 211
ENCODERS: dict[str, Callable[[], torch.nn.Module]] = {
    "SASRec": lambda: SASRec(DIM, 2, 1, 50),
    "HSTU": lambda: HSTU(DIM, WINDOW, 2, 1, 50, 50),
    "HSTU-large": lambda: HSTU(DIM, WINDOW, 8, 2, 25, 25),
}


def build(encoder: str) -> SequenceRecommender:
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(WINDOW, DIM, 0.2)
    sequence = SequenceEncoder(preprocessor, ENCODERS[encoder](), L2NormEmbeddingPostprocessor())
    return SequenceRecommender(LocalEmbeddingModule(ITEMS, DIM), sequence, DotProductSimilarity()).eval()


def milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[1:]), 3)


@torch.no_grad()
def measure(encoder: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = build(encoder).to(device)
    ids = torch.randint(1, ITEMS + 1, (args.rows, args.length + 1), device=device)
    times = torch.randint(1, 10**5, ids.shape, device=device).cumsum(1)
    old, one = torch.full((args.rows,), args.length), torch.ones(args.rows, dtype=torch.int64)
    following = times[:, -1] + 1000
    whole = {"timestamps": times, "next_timestamps": following}
    last = {"timestamps": times[:, -1:], "next_timestamps": following}
    before = {"timestamps": times[:, :-1], "next_timestamps": times[:, -1]}
    _, cache = model.encode_incremental(None, old, ids[:, :-1], before)
    scratch = lambda: model.encode_query(SequentialFeatures(old + 1, ids, whole)).states  # noqa: E731
    append = lambda: model.encode_incremental(cache, one, ids[:, -1:], last)  # noqa: E731
    slow, quick = milliseconds(scratch, args.repeats, device), milliseconds(append, args.repeats, device)
    difference = float((scratch() - append()[0]).abs().max())
    return {"scratch_ms": slow, "append_ms": quick, "ratio": round(slow / quick, 1), "difference": difference}


def main() -> None:
    args = _arguments()
    results = {}
    for encoder in ENCODERS:
        results[encoder] = measure(encoder, args)
        print(encoder, results[encoder], flush=True)
    setup = vars(args) | {"threads": torch.get_num_threads()}
    records.finish({"setup": setup, "results": results})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("rows", 128), ("length", 200), ("repeats", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
