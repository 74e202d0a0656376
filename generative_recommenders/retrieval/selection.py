"""Selection of the k largest scores, ties by the smaller id."""

from __future__ import annotations

from collections.abc import Callable

import torch


def largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, best first, the smaller column first among equals.

    scores: ``[n, C]`` float; a NaN counts as minus infinity. Returns values ``[n, min(k, C)]`` and columns,
        int64.

    ``torch.topk`` picks any of several equal entries at the cut; rows where that matters are sorted whole.
    """
    width = scores.shape[1]
    k = min(k, width)
    if k == 0:
        return scores[:, :0], torch.zeros(len(scores), 0, dtype=torch.int64, device=scores.device)
    # One more than k, which shows whether there is a tie at the cut.
    more, columns = scores.topk(min(k + 1, width), dim=1)
    if more[:, 0].isnan().any():
        return largest(scores.masked_fill(scores.isnan(), -torch.inf), k)
    # By column, then stably by score: equal scores keep the order of their columns.
    columns, order = columns[:, :k].sort(dim=1)
    values, best = more[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, best)
    if k < width:
        tied = (more[:, k] == more[:, k - 1]).nonzero()[:, 0]
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values, columns


def scan(
    score_items: Callable[[int, int], torch.Tensor],
    num_items: int,
    k: int,
    block: int,
    seen_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of items 1..num_items, of which ``block`` are scored at a time.

    score_items: scores ``[n, stop - start]`` of the items ``start + 1 .. stop``, which may be written to.
    seen_ids: ``[n, S]`` int64, padded with 0: items left out of a row.

    Returns scores ``[n, k]`` and ids ``[n, k]`` int64, best first, the smaller id first among equals; a row with fewer
    than k items ends with minus infinity and id 0.
    """
    values: torch.Tensor | None = None
    for start in range(0, max(num_items, 1), block):
        scores = score_items(start, min(start + block, num_items))
        if seen_ids is not None:
            columns = seen_ids - (start + 1)
            rows, places = ((columns >= 0) & (columns < scores.shape[1]) & (seen_ids > 0)).nonzero(as_tuple=True)
            scores[rows, columns[rows, places]] = -torch.inf
        best, columns = largest(scores, k)
        found = columns + (start + 1)
        if values is None:
            values, ids = best, found
        else:
            values, order = largest(torch.cat([values, best], dim=1), k)
            ids = torch.cat([ids, found], dim=1).gather(1, order)
    assert values is not None  # there is always one block
    return fill(values, ids, k)


def fill(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Widens both to k columns; places without an item (minus infinity) get id 0."""
    missing = k - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, missing))
    return values, ids.masked_fill(values == -torch.inf, 0)
