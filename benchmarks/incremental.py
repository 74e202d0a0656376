"""Incremental encoding of one more item against encoding from scratch, in milliseconds a batch.

    python benchmarks/incremental.py --rows=128 --length=200

The last line is one JSON object: for every encoder the median time of both, and the largest difference of their states.
"""

from __future__ import annotations

import argparse
import statistics

import records
import timing
import torch
from untrained import recommender

from generative_recommenders.types import SequentialFeatures

ITEMS = 3416
ENCODERS: dict[str, dict[str, object]] = {
    "SASRec": {"sasrec_encoder.num_blocks": 2, "sasrec_encoder.ffn_hidden_dim": 50},
    "HSTU": {"hstu_encoder.num_blocks": 2, "hstu_encoder.dqk": 50, "hstu_encoder.dv": 50},
    "HSTU-large": {
        "hstu_encoder.num_blocks": 8, "hstu_encoder.num_heads": 2, "hstu_encoder.dqk": 25, "hstu_encoder.dv": 25,
    },
}  # fmt: skip


@torch.no_grad()
def measure(encoder: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    shape = {"train_fn.item_embedding_dim": 50, "train_fn.max_sequence_length": args.length}
    chosen = {"train_fn.main_module": encoder.removesuffix("-large"), **shape, **ENCODERS[encoder]}
    model = recommender(ITEMS, chosen).model.to(device)
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
