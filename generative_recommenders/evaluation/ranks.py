"""Exact ranks by counting, without a sort or a top-k over the catalogue.

The rank of a target is 1 + the candidates scored strictly better + those scored the same with a smaller id.
Seen items are not candidates, and a target among them is a miss. A rank is an integer that does not depend on how users
are batched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from generative_recommenders.data.splits import Split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.evaluation.seen_filters import SeenItems

Ranks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Users, targets and ranks, ``[n]`` int64 on the CPU: internal ids from 1, by user; a rank above V is a miss."""
_CHUNK = 1 << 14
"""Columns compared at a time: the temporary is ``[n, 16384]``, whatever the size of the catalogue."""

_TIE_ELEMENTS = 2**24
"""Scores compared at a time in rows with ties: bounds a temporary of booleans."""


def exact_ranks(scores: torch.Tensor, target_ids: torch.Tensor, seen: SeenItems | None = None) -> torch.Tensor:
    """Ranks of the targets among all items that are not seen.

    scores: ``[n, V]`` float; column i belongs to item i + 1.
    target_ids: ``[n]`` int64. An id outside 1..V or among the row's seen items gets rank V + 1, a miss.

    Returns ``[n]`` int64. A NaN never counts as better than a target; a target scored NaN is ranked below
    every other candidate, so that a diverged model does not look good.
    """
    target_scores = scores_of(scores, target_ids)
    ahead = count_ahead(scores, 1, target_scores, target_ids, seen)
    return torch.where(candidates(target_ids, scores.shape[1], seen), 1 + ahead, scores.shape[1] + 1)


def candidates(target_ids: torch.Tensor, num_items: int, seen: SeenItems | None) -> torch.Tensor:
    """``[n]`` bool: targets that are items, 1..V, and not among the seen ones of their row."""
    real = (target_ids >= 1) & (target_ids <= num_items)
    return real if seen is None else real & ~seen.contains(target_ids)


def scores_of(scores: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """``[n]``: the target's own entry of ``scores [n, V]``; NaN where the id is outside 1..V.

    Ranks must compare with this entry: a product computed apart may differ from it in the last bit.
    """
    columns = (target_ids - 1).clamp(0, max(scores.shape[1] - 1, 0))
    known = (target_ids >= 1) & (target_ids <= scores.shape[1])
    if scores.shape[1] == 0:
        return scores.new_full((len(scores),), float("nan"))
    return scores.gather(1, columns[:, None])[:, 0].masked_fill(~known, float("nan"))


def count_ahead(
    scores: torch.Tensor,
    first_id: int,
    target_scores: torch.Tensor,
    target_ids: torch.Tensor,
    seen: SeenItems | None = None,
) -> torch.Tensor:
    """Number of candidates in one block of the catalogue that rank before the target.

    scores: ``[n, C]`` scores of the items ``first_id .. first_id + C - 1``.
    target_scores: ``[n]``, the same numbers that some block holds for the target (`scores_of`); target_ids:
        ``[n]``.
    seen: of the whole catalogue; those outside the block are passed over.

    Returns ``[n]`` int64; summed over the blocks of a catalogue, plus 1, it is the exact rank.
    """
    column = target_ids - first_id
    inside = (column >= 0) & (column < scores.shape[1])
    ahead = _count_where(scores, target_scores, torch.gt)
    # Equal scores count in columns before the target's. A row without any, as nearly every row is, costs one
    # comparison.
    equal = _count_where(scores, target_scores, torch.eq) - inside.long()
    columns = torch.arange(scores.shape[1], device=scores.device)
    for rows in (equal > 0).nonzero()[:, 0].split(max(1, _TIE_ELEMENTS // max(1, scores.shape[1]))):
        same = scores[rows] == target_scores[rows, None]
        ahead[rows] += (same & (columns < column[rows, None])).sum(1)
    # NaN compares as neither greater nor equal: without this a diverged model would rank every target first.
    ahead = torch.where(target_scores.isnan(), scores.shape[1] - inside.long(), ahead)
    if seen is not None:
        here = (seen.ids >= first_id) & (seen.ids < first_id + scores.shape[1])
        rows, ids = seen.rows[here], seen.ids[here]
        ahead -= pairs_ahead(rows, ids, scores[rows, ids - first_id], target_scores, target_ids)
    return ahead


def pairs_ahead(
    rows: torch.Tensor,
    ids: torch.Tensor,
    scores: torch.Tensor,
    target_scores: torch.Tensor,
    target_ids: torch.Tensor,
) -> torch.Tensor:
    """``[n]`` int64: of pairs of a row and an item ``[S]`` with their scores, how many are ahead of the row's
    target."""
    own, targets = target_scores[rows], target_ids[rows]
    counted = (scores > own) | ((scores == own) & (ids < targets)) | (own.isnan() & (ids != targets))
    return torch.bincount(rows[counted], minlength=len(target_ids))


def _count_where(scores: torch.Tensor, target_scores: torch.Tensor, compare: Callable) -> torch.Tensor:
    """``[n]`` int64: columns of ``scores [n, C]`` for which ``compare(score, target score)`` holds."""
    total = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    # torch's CPU kernels compare, and sum, several numbers at a time in floats and one at a time in booleans.
    hits = scores.new_empty(len(scores), min(_CHUNK, scores.shape[1]))
    for chunk in scores.split(_CHUNK, dim=1):
        compare(chunk, target_scores[:, None], out=hits[:, : chunk.shape[1]])
        total += hits[:, : chunk.shape[1]].sum(1, dtype=torch.float32).long()
    return total


def user_ranks(dataset: SequenceDataset, split: Split, ranks: torch.Tensor) -> Ranks:
    """Of an evaluation of test targets. ranks: ``[U]``, see `EvaluationResult`."""
    users = ranks.numpy().nonzero()[0]
    targets = dataset.items[dataset.offsets[users] + split.test_targets[users]]
    return torch.from_numpy(users + 1), torch.from_numpy(targets.astype("int64")), ranks[users]
