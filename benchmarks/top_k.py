"""Time and recall of the top-k searches over one catalogue; the last line is one JSON object.

    python benchmarks/top_k.py --items=20000 --queries=128 --k=100

A mixture of logits is first fitted, for --fit_steps, to rank items of the same cluster high, so that its
mixture is not that of random weights. Recall is the share of the exact search's k items that an approximate
one finds; "mips" is plain dot-product search, for its time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import records
import timing
import torch
from torch.nn import functional as F

from generative_recommenders.build.factories import create_mol_interaction_module
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from generative_recommenders.retrieval.methods import make_top_k

APPROXIMATE = (
    "MoLNaiveTopK5",
    "MoLNaiveTopK50",
    "MoLAvgTopK200",
    "MoLAvgTopK1000",
    "MoLCombTopK5_200",
    "MoLCombTopK50_500",
)


def clustered(count: int, dim: int, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[count, dim]`` points around random centres, and the cluster of each."""
    centres = torch.randn(clusters, dim, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, clusters, (count,))
    return centres[labels] + 0.7 * torch.randn(count, dim), labels


def fitted(options: dict[str, int], dim: int, clusters: int, steps: int) -> MoLSimilarity:
    """A mixture trained by in-batch softmax on pairs of a query and an item of one cluster."""
    similarity = create_mol_interaction_module(dim, dim, **options).train()
    optimizer = torch.optim.AdamW(similarity.parameters(), lr=1e-3)
    for _ in range(steps):
        queries, labels = clustered(64, dim, clusters)
        items, of_item = clustered(256, dim, clusters)
        scores, losses = similarity.score(queries, items)
        target = (labels[:, None] == of_item).float()
        rows = target.sum(1) > 0
        wanted = target[rows] / target[rows].sum(1, keepdim=True)
        loss = F.cross_entropy(scores[rows], wanted) + 0.001 * losses["mi_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return similarity.eval()


def measure(
    method: str,
    similarity: MoLSimilarity | DotProductSimilarity,
    items: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds to build the index and, median of the repeats, to search all queries; and the ids found."""
    start = time.perf_counter()
    index = make_top_k(method, similarity, items)
    built = time.perf_counter() - start
    torch.manual_seed(args.seed + 1)
    queries, _ = clustered(args.queries, items.shape[1], args.clusters)
    times = timing.seconds_of(lambda: index(queries, args.k), args.repeats, warmup=0)
    _, ids = index(queries, args.k)
    return {"build_seconds": round(built, 4), "search_seconds": round(statistics.median(times), 4)}, ids


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean share of the exact ids ``[n, k]`` that are among the found ones ``[n, k]``."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).float().mean())


def main() -> None:
    parser = records.parser_of(
        __doc__, items=20_000, queries=128, k=100, dim=64, clusters=50, query_groups=8, item_groups=4,
        component_dim=64, fit_steps=200, repeats=1, seed=0,
    )  # fmt: skip
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    options = {
        "query_dot_product_groups": args.query_groups,
        "item_dot_product_groups": args.item_groups,
        "dot_product_dimension": args.component_dim,
    }
    similarity = fitted(options, args.dim, args.clusters, args.fit_steps)
    items, _ = clustered(args.items, args.dim, args.clusters)
    mips, _ = measure("MIPSBruteForceTopK", DotProductSimilarity(), items, args)
    brute, exact = measure("MoLBruteForceTopK", similarity, items, args)
    results = {"MIPSBruteForceTopK": mips, "MoLBruteForceTopK": brute}
    for method in APPROXIMATE:
        results[method], ids = measure(method, similarity, items, args)
        results[method]["recall"] = round(recall(ids, exact), 4)
        print(method, results[method], flush=True)
    setup = vars(args) | {"threads": torch.get_num_threads()}
    records.finish({"setup": setup, "results": results})


if __name__ == "__main__":
    main()
