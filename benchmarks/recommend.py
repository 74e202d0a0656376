"""Time of exact answers beside the bare products and faiss's exact index; the last line is one JSON object.

    python benchmarks/recommend.py --users=1000 --items=700000 --one_user_items=1000000

Items and users are random and of the same width. "products" are the scores alone, in blocks of the same size, of many
users on each core apart as in "search", kept by nobody; "search" finds the k best of each user without what the user
has seen. For one user, "quantized_search" finds the same by way of 8-bit integers, and "whole_answer" is
`Recommender.recommend`, the history's ids in, a frame of ids out. faiss is measured where it is installed, without seen
items, which its index does not filter. Every time is the median of the repeats, taken by turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import floors
import records
import timing
import torch
from untrained import recommender

from generative_recommenders.ops.threads import in_threads
from generative_recommenders.retrieval import product_search, quantized_search
from generative_recommenders.retrieval.product_search import search_products
from generative_recommenders.retrieval.quantized_search import QuantizedItems


def bare_products(queries: torch.Tensor, items: torch.Tensor) -> None:
    cores = torch.get_num_threads()
    apart = len(queries) >= product_search.FEWEST_ROWS * cores
    rows = min(product_search.BLOCK_ROWS, -(-len(queries) // cores) if apart else len(queries))
    width = product_search.BLOCK_SCORES // rows

    def multiply(some: torch.Tensor) -> None:
        scores = torch.empty(rows, width)
        for block in items.split(width):
            torch.mm(some, block.T, out=scores[: len(some), : len(block)])

    if apart:
        in_threads(multiply, queries.split(rows))
    else:
        for some in queries.split(rows):
            multiply(some)


def faiss_search(items: torch.Tensor, queries: torch.Tensor, k: int) -> Callable[[], object] | None:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.numpy())
    return lambda: index.search(queries.numpy(), k)


def whole_answer(items: torch.Tensor, history: torch.Tensor, k: int) -> Callable[[], object]:
    """One user's `Recommender.recommend`, of an untrained SASRec over these items: reading, encoding, search and
    frame."""
    shape = {"train_fn.max_sequence_length": len(history), "train_fn.item_embedding_dim": items.shape[1]}
    made = recommender(len(items), shape)
    made.snapshot = made.snapshot._replace(embeddings=items)
    asked = {"reader": [str(number) for number in history.tolist()]}
    return lambda: made.recommend(asked, k)


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least of each call."""
    times = timing.by_turns(calls, repeats)
    return {
        name: {"median": round(1000 * statistics.median(each), 3), "least": round(1000 * min(each), 3)}
        for name, each in times.items()
    }


def measure(users: int, num_items: int, args: argparse.Namespace, repeats: int) -> dict[str, object]:
    items, queries = torch.randn(num_items, args.dim), torch.randn(users, args.dim)
    seen = torch.randint(1, num_items + 1, (users, args.seen))
    calls: dict[str, Callable[[], object]] = {
        "products": lambda: bare_products(queries, items),
        "search": lambda: search_products(queries, items, args.k, seen),
    }
    if quantized_search.is_faster(queries, num_items):
        quantized = QuantizedItems(items)
        calls["quantized_search"] = lambda: quantized.search(queries, args.k, seen)
    indexed = faiss_search(items, queries, args.k)
    if indexed is not None:
        calls["faiss"] = indexed
    found = milliseconds(calls, repeats)
    if "quantized_search" in calls:
        # By itself: threads of other libraries still spin when their turn is over.
        found |= milliseconds({"whole_answer": whole_answer(items, seen[0], args.k)}, repeats)
    ratio = {kind: round(found["search"][kind] / found["products"][kind], 3) for kind in ("median", "least")}
    return {"milliseconds": found, "search_to_products": ratio}


def main() -> None:
    parser = records.parser_of(
        __doc__, users=1000, items=700_000, one_user_items=1_000_000, dim=64, k=10, seen=50,
        repeats=3, one_user_repeats=31, seed=0,
    )  # fmt: skip
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    results = {
        "many_users": measure(args.users, args.items, args, args.repeats),
        "one_user": measure(1, args.one_user_items, args, args.one_user_repeats),
    }
    for name, result in results.items():
        print(name, result)
    setup = vars(args) | {"threads": torch.get_num_threads()}
    records.finish({"setup": setup, "copied_gb_a_second": floors.copied_gb_a_second(), "results": results})


if __name__ == "__main__":
    main()
