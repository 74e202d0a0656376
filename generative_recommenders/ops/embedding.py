"""Rows of a table looked up by number, and sums back into the table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from generative_recommenders.ops import dispatch

SORTED_FROM = 1 << 15
"""Rows of a lookup, at least, whose gradient is summed sorted."""
_BLOCK = 1 << 22
"""Numbers that are looked at together."""
DENSE_SHARE = 4
"""A step that reads more than 1 / DENSE_SHARE of a table works on all of it: no search for unique rows. On a CPU an
optimizer of single rows leaves the others alone, so that gathering pays up to the whole table."""
_FEW = 8
"""Ids are few where more than so many times their number could be."""


LateGradients = list[tuple[torch.Tensor, torch.Tensor]]
"""Rows ``[n]`` of a leaf and their gradients ``[n, D]``, to be added to its own gradient after the backward pass."""


def lookup_rows(weight: torch.Tensor, rows: torch.Tensor, late: LateGradients | None = None) -> torch.Tensor:
    """``weight[rows]`` for a table ``[U, D]`` and int64 rows of any shape. On a CPU its gradient has one order of
    summing, where that of an index has the threads'.

    late: takes the gradient of few rows of many on a CPU, where one of the whole weight, and autograd's sum of it and
    others, would be several passes over memory. The weight is then a leaf.
    """
    if not dispatch.fast():
        return lookup_rows_reference(weight, rows)
    return _Lookup.apply(weight, rows, late)


def lookup_rows_reference(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`lookup_rows` in plain torch."""
    return F.embedding(rows, weight)


def bags_of_rows(rows: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places in ``rows [n]`` sorted by what they hold, in their order, ``[n]`` int64, and where each row's begin,
    ``[num_rows + 1]`` int64: bags for `torch.nn.functional.embedding_bag`.
    """
    # A sort of 16-bit numbers takes half the passes.
    dtype = torch.int16 if num_rows <= torch.iinfo(torch.int16).max else torch.int32
    ordered, order = rows.to(dtype).sort(stable=True)
    if dispatch.fast_on_cpu(rows) and _FEW * num_rows > len(rows):
        # Bags are short: counted faster than searched for.
        return order, F.pad(torch.bincount(rows, minlength=num_rows).cumsum(0), (1, 0))
    return order, torch.searchsorted(ordered, torch.arange(num_rows + 1, device=rows.device).to(dtype))


def sorted_unique(ids: torch.Tensor, largest: int | None = None) -> torch.Tensor:
    """Ids of any shape, int64, sorted and each once; on an accelerator, whose number of ids the host would wait for, as
    many as came in, the largest one filling up the end. largest: that no id of 0 or more exceeds, where it is known.
    """
    if not dispatch.waits(ids):
        if largest is None or not dispatch.fast() or _FEW * ids.numel() < largest:
            return torch.unique(ids)
        marked = torch.zeros(largest + 1, dtype=torch.bool)  # a byte an id, read through once
        return marked.index_fill_(0, ids.flatten(), True).nonzero()[:, 0]
    # No number is looked at: as many slots as ids, the largest id again in those that are left.
    values = ids.flatten().sort().values
    slots = (values[1:] != values[:-1]).cumsum(0)
    ends = values[-1:].repeat(len(values))
    ends[:1] = values[:1]
    return ends.scatter_(0, slots, values[1:])


def range_of(ids: torch.Tensor) -> tuple[int, int] | None:
    """The least and the largest id; None where there are none, or where a look would wait for an accelerator."""
    if dispatch.waits(ids) or not ids.numel():
        return None
    least, largest = ids.aminmax()
    return int(least), int(largest)


def gathering_pays(num_read: int, table: torch.Tensor, updates_rows: bool, tower: bool) -> bool:
    """Whether a step gathers the rows that it reads, ``num_read`` of them with repeats, and does not work on the whole
    table.

    updates_rows: the optimizer updates single rows. tower: items that are scored are computed from their rows.
    """
    on_cpu = not dispatch.waits(table)
    if on_cpu and tower:
        # Each item is then computed once; an accelerator would compute as many as are read.
        return True
    # 1 as a rule; 0, with which tests have rows gathered however small the table is, stays 0.
    share = min(1, DENSE_SHARE) if on_cpu and updates_rows else DENSE_SHARE
    return num_read * share <= len(table)


def places_of(held: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Where each of ``ids``, of any shape, stands in ``held``, which has them all, as of `sorted_unique`; int64."""
    if dispatch.waits(held) or not dispatch.fast() or not len(held) or _FEW * ids.numel() <= int(held[-1]):
        return places_of_reference(held, ids)
    # Only the places of held ids are set, and read.
    places = torch.empty(int(held[-1]) + 1, dtype=torch.int32)
    places.index_copy_(0, held, torch.arange(len(held), dtype=torch.int32))
    return places.index_select(0, ids.flatten()).long().view(ids.shape)


def places_of_reference(held: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`places_of` by binary search."""
    return torch.searchsorted(held, ids)


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; in blocks, so that a large table costs no memory of its size."""
    return all(bool(block.isfinite().all()) for block in values.detach().reshape(-1).split(_BLOCK))


class _Lookup(torch.autograd.Function):
    """Row lookup whose gradient is one index_add, or on a CPU one sum over bags where that pays for sorting; both
    deterministic there."""

    @staticmethod
    def forward(ctx, weight, rows, late):
        ctx.save_for_backward(rows)
        ctx.num_rows, ctx.late = weight.shape[0], late
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        rows, grad = rows.flatten(), grad.reshape(-1, grad.shape[-1])
        if ctx.late is not None and _FEW * len(rows) < ctx.num_rows and dispatch.fast_on_cpu(grad):
            ctx.late.append((rows, grad))
            return None, None, None
        if len(rows) >= SORTED_FROM and len(rows) > ctx.num_rows and dispatch.fast_on_cpu(grad):
            order, starts = bags_of_rows(rows, ctx.num_rows)
            return F.embedding_bag(order, grad, starts, mode="sum", include_last_offset=True), None, None
        out = grad.new_zeros(ctx.num_rows, grad.shape[-1])
        return out.index_add_(0, rows, grad), None, None
