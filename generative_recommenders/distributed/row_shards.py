"""Shards of a table: its rows dealt to the processes of a run, and exchanged by all-to-all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError


@dataclass(frozen=True)
class Route:
    """The all-to-all of a step's rows. receive_counts: rows that each process sends here; send_counts: rows that this
    process sends to each; rows: ``[sum of send_counts]`` int64, numbers of those in the shard."""

    receive_counts: list[int]
    send_counts: list[int]
    rows: torch.Tensor


class RowShard:
    """Rows [first, stop) of a table of num_rows rows, those of this process; lower ranks hold the rows before.

    Row 0 is that of padding, row i that of item id i: ``before`` items lie on lower ranks. largest: rows of the largest
    shard. All shards but the last have as many rows. Every method is called by all processes together. UserError where
    a process would get fewer than two rows.
    """

    def __init__(self, num_rows: int, collectives: Collectives) -> None:
        world, rank = collectives.world_size, collectives.rank
        block = -(-num_rows // world)
        if num_rows - block * (world - 1) < 2:
            raise UserError(
                f"train_fn.item_table: {num_rows - 1} items are too few to be sharded over {world} processes: "
                "set 'replicated'"
            )
        self.collectives, self.num_rows = collectives, num_rows
        self.bounds = [min(block * each, num_rows) for each in range(world + 1)]
        self.first, self.stop = self.bounds[rank : rank + 2]
        self.before = max(self.first - 1, 0)
        self.num_items = num_rows - 1
        self.largest = block

    # -- rows of a step -----------------------------------------------------------------------------------------

    def route(self, ids: torch.Tensor) -> Route:
        """Asks the other processes for the rows ``ids [U]``, int64 and sorted."""
        edges = torch.tensor(self.bounds[1:-1], device=ids.device, dtype=torch.int64)
        cuts = [0, *torch.searchsorted(ids, edges).tolist(), len(ids)]
        receive_counts = [stop - start for start, stop in pairwise(cuts)]
        wanted, send_counts = self.collectives.exchange(ids, receive_counts)
        return Route(receive_counts, send_counts, wanted - self.first)

    def gather(self, table: torch.Tensor, route: Route) -> torch.Tensor:
        """``[U, D]``, the rows that this process asked for. table: the shard ``[stop - first, D]``."""
        rows = table.detach()[route.rows]
        return self.collectives.exchange(rows, route.send_counts, route.receive_counts)[0]

    def sums(self, gradients: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients ``[U, D]`` of the rows asked for, sent to where these lie and summed there over processes: numbers
        of rows in the shard, sorted and each once, and their gradients."""
        received, _ = self.collectives.exchange(gradients, route.receive_counts, route.send_counts)
        rows, place = torch.unique(route.rows, return_inverse=True)
        return rows, received.new_zeros(len(rows), received.shape[1]).index_add_(0, place, received)

    # -- sums over the catalogue --------------------------------------------------------------------------------

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` (one shape on all processes) over processes, with the gradient of this one's part."""
        own = x.detach()
        total = self.collectives.sum_(own.clone())
        # In this order the number is the sum itself, the same on all processes: x - own is 0 and brings the gradient.
        # Where none is asked for, x may be infinite.
        return total + (x - own) if x.requires_grad else total

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """``[processes, ...]`` of ``x [...]``, of which this process's part has a gradient."""
        every = list(self.collectives.gather_variable(x[None]))
        every[self.collectives.rank] = x
        return torch.stack(every)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """``[sum of n, ...]`` of ``x [n, ...]``, whose gradients by the parts of all processes are summed."""
        rank = self.collectives.rank
        counts = self.collectives.gather_variable(torch.tensor([len(x)])).tolist()
        every = self.collectives.gather_variable(x)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return every
        start = sum(counts[:rank])
        whole = torch.cat([every[:start], x, every[start + len(x) :]])
        whole.register_hook(lambda gradient: self.collectives.sum_(gradient.clone()))
        return whole
