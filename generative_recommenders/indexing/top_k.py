"""Top-k over a catalogue by blocks: the k best items of each query, with seen items left out."""

from __future__ import annotations

import torch


def largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, best first, the smaller column first among equals.

    scores: ``[n, C]`` float; a NaN counts as minus infinity. Returns values ``[n, min(k, C)]`` and columns,
        int64.

    ``torch.topk`` picks any of several equal entries at the cut. Only rows where that matters are sorted in
    full.
    """
    width = scores.shape[1]
    k = min(k, width)
    if k == 0:
        return scores[:, :0], torch.zeros(len(scores), 0, dtype=torch.int64, device=scores.device)
    more, columns = scores.topk(min(k + 1, width), dim=1)
    if more[:, 0].isnan().any():
        return largest(scores.masked_fill(scores.isnan(), -torch.inf), k)
    columns, order = columns[:, :k].sort(dim=1)
    values, best = more[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, best)
    if k < width:
        tied = (more[:, k] == more[:, k - 1]).nonzero()[:, 0]
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values, columns
