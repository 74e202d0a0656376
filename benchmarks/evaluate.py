"""Time and memory of exact evaluation beside the bare products of its scores; the last line is JSON.

    python benchmarks/evaluate.py --users=969656 --items=801350        # Amazon Books whole, some 20 minutes
    python benchmarks/evaluate.py --users=8192 --items=801350
    python benchmarks/evaluate.py --users=6040 --items=3416 --dim=50

Queries and items are random, histories of ``--seen`` items among them; encoding is not part of it. The floor is the
fastest of several blockings of the bare products, each shared out by torch or with items of its own for each thread,
measured on ``--floor_users`` users before and after. Peak memory is what the process grows by over queries, items and
histories.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import records
import torch
from catalogue_loss import PeakMemory

from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.evaluation.product_ranks import USERS, product_ranks
from generative_recommenders.evaluation.seen_filters import SeenItems
from generative_recommenders.ops.threads import in_threads

BLOCKINGS = ((512, 512), (512, 1024), (512, 2048), (1024, 1024))
"""Users and items of a product."""


def products_a_second(queries: torch.Tensor, parts: Sequence[torch.Tensor], users: int, width: int) -> float:
    """Users a second of the products alone. parts: of the items, for threads of their own."""

    def products(items: torch.Tensor) -> None:
        memory = torch.empty(width * users)
        for block in items.split(width):
            torch.mm(block, columns, out=memory[: len(block) * columns.shape[1]].view(len(block), -1))

    start = time.perf_counter()
    for some in queries.split(users):
        columns = some.T.contiguous()
        in_threads(products, parts)
    return len(queries) / (time.perf_counter() - start)


def floor(queries: torch.Tensor, items: torch.Tensor) -> dict[str, float]:
    apart = items.chunk(torch.get_num_threads())
    rates = {f"{u} x {w}": products_a_second(queries, [items], u, w) for u, w in BLOCKINGS}
    return rates | {f"{u} x {w} apart": products_a_second(queries, apart, u, w) for u, w in BLOCKINGS}


def main() -> None:
    parser = records.parser_of(__doc__, users=8192, items=801_350, dim=64, seen=10, floor_users=2048, seed=0)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(args.seed)
    queries, items = torch.randn(args.users, args.dim), torch.randn(args.items, args.dim)
    targets = torch.randint(1, args.items + 1, (args.users,))
    some = queries[: min(args.floor_users, args.users)]
    before = floor(some, items)
    start = time.perf_counter()
    with PeakMemory() as memory:
        for first in range(0, args.users, USERS):
            rows = slice(first, first + USERS)
            seen = torch.randint(1, args.items + 1, (len(queries[rows]), args.seen))
            product_ranks(queries[rows], items, targets[rows], SeenItems.padded(seen, args.items))
    seconds = time.perf_counter() - start
    rates = {name: max(rate, after) for (name, rate), after in zip(before.items(), floor(some, items).values())}
    best = max(rates.values())
    result = {
        "setup": vars(args) | {"threads": torch.get_num_threads()},
        "seconds": round(seconds, 2),
        "users_per_second": round(args.users / seconds, 1),
        "products_users_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(best * seconds / args.users, 3),
        "peak_mb_beyond_inputs": round(memory.growth / 1e6, 1),
    }
    records.finish(result)


if __name__ == "__main__":
    main()
