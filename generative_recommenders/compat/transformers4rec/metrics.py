"""Transformers4Rec's ranking metrics at several cutoffs: torchmetrics classes over the program's list metrics.

States are a sum and a count that are added across processes, so the result is the mean over all rows, however many each
process had. Of equal scores the smaller column comes first. The formulas are those of `evaluation.list_metrics`, with
h_r the label at rank r: recall and average precision are 0 without relevant items.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.list_metrics import metrics_of_hits
from generative_recommenders.retrieval.selection import largest

__all__ = [
    "AvgPrecisionAt",
    "DCGAt",
    "MeanRecipricolRankAt",
    "MeanReciprocalRankAt",
    "NDCGAt",
    "PrecisionAt",
    "RankingMetric",
    "RecallAt",
]


class RankingMetric(Metric):
    """Mean over rows of a metric at the cutoffs ``top_ks``.

    top_ks: cutoffs, default [2, 5]; one may exceed the number of scored items.
    labels_onehot: True where targets are column numbers ``[n]``; False where they are 0/1 labels ``[n, C]``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    metric: str
    """Its name among `metrics_of_hits`."""
    total: Tensor
    count: Tensor

    def __init__(self, top_ks: Sequence[int] | None = None, labels_onehot: bool = False) -> None:
        super().__init__()
        try:
            self.top_ks = [operator.index(k) for k in ([2, 5] if top_ks is None else top_ks)]
        except TypeError:
            self.top_ks = []
        if min(self.top_ks, default=0) < 1:
            raise UserError(f"top_ks: cutoffs must be a list of whole numbers, 1 or more, got {top_ks!r}")
        self.labels_onehot = labels_onehot
        zeros = torch.zeros(len(self.top_ks), dtype=torch.float64)
        self.add_state("total", default=zeros, dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, **kwargs: object) -> None:
        """preds: ``[..., C]`` scores; target: ``[...]`` columns (labels_onehot) or ``[..., C]`` labels."""
        rows = self.rows(preds, target)
        self.total += rows.sum(0)
        self.count += len(rows)

    def compute(self) -> Tensor:
        """``[len(top_ks)]`` float32 (a scalar for one cutoff, as torchmetrics has it); 0 without rows."""
        return (self.total / self.count.clamp(min=1)).float()

    def rows(self, preds: Tensor, target: Tensor) -> Tensor:
        """``[n, len(top_ks)]`` float64: the metric of each row. Arguments as `update`."""
        if preds.dim() == 0 or preds.shape[-1] == 0:
            raise UserError(f"preds: {tuple(preds.shape)} has no column to score")
        num_columns = preds.shape[-1]
        scores = preds.reshape(-1, num_columns)
        width = 1 if self.labels_onehot else num_columns
        if target.numel() != len(scores) * width or (not self.labels_onehot and target.shape[-1:] != (width,)):
            raise UserError(
                f"target: {tuple(target.shape)} does not fit scores {tuple(preds.shape)}; "
                "column numbers need labels_onehot=True"
            )
        labels = target.reshape(-1, width)
        best = largest(scores, max(self.top_ks))[1]
        if self.labels_onehot:
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_columns:
                raise UserError(f"target: column numbers must be in 0..{num_columns - 1}")
            # One relevant item a row, found without the row of labels that it stands for.
            hits, relevant = (best == labels).double(), torch.ones_like(labels[:, 0], dtype=torch.float64)
        else:
            hits, relevant = labels.gather(1, best).double(), labels.sum(1, dtype=torch.float64)
        return torch.stack([self.at_cutoff(hits, relevant, k) for k in self.top_ks], dim=1)

    def at_cutoff(self, hits: Tensor, relevant: Tensor, k: int) -> Tensor:
        """``[n]`` from the labels in the order of the scores ``[n, max(top_ks)]`` and their sum ``[n]``."""
        return metrics_of_hits(hits, relevant.clamp(min=1), k)[self.metric]


class PrecisionAt(RankingMetric):
    """Precision@k."""

    metric = "precision"


class RecallAt(RankingMetric):
    """Recall@k."""

    metric = "recall"


class AvgPrecisionAt(RankingMetric):
    """Average precision@k."""

    metric = "map"


class DCGAt(RankingMetric):
    """Discounted cumulative gain@k."""

    metric = "dcg"


class NDCGAt(DCGAt):
    """DCG@k over the DCG@k of the retrieved labels in their best order.

    The ideal order is made of the labels among the ``max(top_ks)`` best scored items, not of all relevant ones, as in
    Transformers4Rec: with several relevant items a row the value exceeds the usual NDCG and depends on ``max(top_ks)``.
    With one relevant item a row it is the usual one.
    """

    def at_cutoff(self, hits: Tensor, relevant: Tensor, k: int) -> Tensor:
        best = hits.sort(dim=1, descending=True).values
        gain, ideal = (super(NDCGAt, self).at_cutoff(order, relevant, k) for order in (hits, best))
        return torch.where(ideal > 0, gain / ideal.clamp(min=1e-12), 0.0)


class MeanReciprocalRankAt(RankingMetric):
    """Reciprocal rank of the first relevant item within k, else 0."""

    metric = "mrr"


MeanRecipricolRankAt = MeanReciprocalRankAt
"""The name as Transformers4Rec spells it."""
