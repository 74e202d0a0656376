"""Ranking metrics at several cutoffs as torchmetrics classes, with the names and arguments of
Transformers4Rec.

States are a sum and a count that are added across processes, so the result is the mean over all rows, however
many each process had. Equal scores are ordered by the smaller column. With r the rank, h_r the label there
and n the number of relevant items of a row:

precision = sum_{r<=k} h_r / k; recall = sum / n, 0 without relevant items; average precision = sum h_r
precision@r / min(max(n, 1), k); DCG = sum h_r / log2(r + 1); reciprocal rank = max_{r<=k} h_r / r.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torchmetrics import Metric

from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.selection import largest


class RankingMetric(Metric):
    """Mean over rows of a metric at the cutoffs ``top_ks``.

    top_ks: cutoffs, default [2, 5]; one may exceed the number of scored items.
    labels_onehot: True where targets are column numbers ``[n]``; False where they are 0/1 labels ``[n, C]``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, top_ks: Sequence[int] | None = None, labels_onehot: bool = False) -> None:
        super().__init__()
        self.top_ks = _cutoffs([2, 5] if top_ks is None else top_ks)
        self.labels_onehot = labels_onehot
        zeros = torch.zeros(len(self.top_ks), dtype=torch.float64)
        self.add_state("total", default=zeros, dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor, **kwargs: object) -> None:
        """preds: ``[..., C]`` scores; target: ``[...]`` columns (labels_onehot) or ``[..., C]`` labels."""
        rows = self.rows(preds, target)
        self.total += rows.sum(0)
        self.count += len(rows)

    def compute(self) -> torch.Tensor:
        """``[len(top_ks)]`` float32 (a scalar for one cutoff, as torchmetrics has it); 0 without rows."""
        return (self.total / self.count.clamp(min=1)).float()

    def rows(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """``[n, len(top_ks)]`` float64: the metric of each row. Arguments as `update`."""
        if preds.dim() == 0 or preds.shape[-1] == 0:
            raise UserError(f"preds: {tuple(preds.shape)} has no column to score")
        scores = preds.reshape(-1, preds.shape[-1])
        labels = self._labels(target, scores.shape[1])
        if labels.shape != scores.shape:
            raise UserError(
                f"target: {tuple(target.shape)} does not fit scores {tuple(preds.shape)}; "
                "column numbers need labels_onehot=True"
            )
        deepest = max(self.top_ks)
        hits = labels.gather(1, largest(scores, deepest)[1])
        hits = F.pad(hits, (0, deepest - hits.shape[1]))
        return torch.stack([self._at(hits, labels.sum(1), k) for k in self.top_ks], dim=1)

    def _labels(self, target: torch.Tensor, num_columns: int) -> torch.Tensor:
        if not self.labels_onehot:
            same = target.shape[-1:] == (num_columns,)
            return (target.reshape(-1, num_columns) if same else target).double()
        columns = target.reshape(-1)
        if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= num_columns):
            raise UserError(f"target: column numbers must be in 0..{num_columns - 1}")
        return F.one_hot(columns.long(), num_columns).double()

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        """``[n]`` from the labels in the order of the scores ``[n, max(top_ks)]`` and their sum ``[n]``."""
        raise NotImplementedError


class PrecisionAt(RankingMetric):
    """Precision@k."""

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        return hits[:, :k].sum(1) / k


class RecallAt(RankingMetric):
    """Recall@k."""

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        return hits[:, :k].sum(1) / relevant.clamp(min=1)


class AvgPrecisionAt(RankingMetric):
    """Average precision@k."""

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        top = hits[:, :k]
        return (top * top.cumsum(1) / _ranks(top)).sum(1) / relevant.clamp(1, k)


class DCGAt(RankingMetric):
    """Discounted cumulative gain@k."""

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        return _dcg(hits[:, :k])


class NDCGAt(RankingMetric):
    """DCG@k over the DCG@k of the retrieved labels in their best order.

    The ideal order is made of the labels among the ``max(top_ks)`` best scored items, not of all relevant
    ones, as in
    Transformers4Rec: with several relevant items a row the value exceeds the usual NDCG and depends on
    ``max(top_ks)``. With one relevant item a row it is the usual one.
    """

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        ideal = _dcg(hits.sort(dim=1, descending=True).values[:, :k])
        return torch.where(ideal > 0, _dcg(hits[:, :k]) / ideal.clamp(min=1e-12), 0.0)


class MeanReciprocalRankAt(RankingMetric):
    """Reciprocal rank of the first relevant item within k, else 0."""

    def _at(self, hits: torch.Tensor, relevant: torch.Tensor, k: int) -> torch.Tensor:
        top = hits[:, :k]
        return (top / _ranks(top)).amax(1)


MeanRecipricolRankAt = MeanReciprocalRankAt
"""The name as Transformers4Rec spells it."""


def _cutoffs(top_ks: Sequence[int]) -> list[int]:
    """The cutoffs as a list; ``UserError`` for anything but one or more whole numbers from 1."""
    try:
        listed = [operator.index(k) for k in top_ks]
    except TypeError:
        listed = []
    if min(listed, default=0) < 1:
        raise UserError(f"top_ks: cutoffs must be a list of whole numbers, 1 or more, got {top_ks!r}")
    return listed


def _ranks(hits: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)


def _dcg(hits: torch.Tensor) -> torch.Tensor:
    return (hits / torch.log2(_ranks(hits) + 1)).sum(1)
