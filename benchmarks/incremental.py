"""Incremental encoding of one more item against encoding from scratch, in milliseconds a batch.

    python benchmarks/incremental.py --rows=128 --length=200

The last line is one JSON object: for every encoder the median time of both, and the largest difference of their states.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import records
import timing
import torch

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

    def scratch() -> torch.Tensor:
        return model.encode_query(SequentialFeatures(old + 1, ids, whole)).states

    def append() -> torch.Tensor:
        return model.encode_incremental(cache, one, ids[:, -1:], last)[0]

    slow, quick = (1000 * statistics.median(timing.seconds_of(each, args.repeats)) for each in (scratch, append))
    return {
        "scratch_ms": round(slow, 3),
        "append_ms": round(quick, 3),
        "ratio": round(slow / quick, 1),
        "difference": float((scratch() - append()).abs().max()),
    }


def main() -> None:
    parser = records.parser_of(__doc__, rows=128, length=200, repeats=5, seed=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    results = {}
    for encoder in ENCODERS:
        results[encoder] = measure(encoder, args)
        print(encoder, results[encoder], flush=True)
    records.finish({"setup": {**vars(args), "threads": torch.get_num_threads()}, "results": results})


if __name__ == "__main__":
    main()
