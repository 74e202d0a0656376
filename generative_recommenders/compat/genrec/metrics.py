"""genrec's list metrics under their documented names."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from generative_recommenders.evaluation.list_metrics import diversity

Lists = list[list[int]]


class RecommendationMetrics:
    """Metrics of plain Python lists of any hashable ids, one list per user, as genrec documents them.

    Users without targets are left out (precision counts them), lists may be shorter than k, and 0.0 is
    returned where no user counts. As documented there, ndcg counts an item repeated in a list each time.
    """

    @staticmethod
    def recall_at_k(predictions: Lists, targets: Lists, k: int) -> float:
        """Mean of |top k and targets| / |targets|."""
        return _mean([len(set(p[:k]) & set(t)) / len(set(t)) for p, t in zip(predictions, targets) if len(t)])

    @staticmethod
    def precision_at_k(predictions: Lists, targets: Lists, k: int) -> float:
        """Mean of |top k and targets| / k; 0.0 for k = 0."""
        return _mean([len(set(p[:k]) & set(t)) / k for p, t in zip(predictions, targets) if k])

    @staticmethod
    def ndcg_at_k(predictions: Lists, targets: Lists, k: int) -> float:
        """Mean of DCG@k over the DCG of min(|targets|, k) hits in a row, with gains 1 / log2(rank + 1)."""
        gains = 1 / np.log2(np.arange(2, max(k, 0) + 2))
        values = []
        for prediction, target in zip(predictions, targets):
            if len(target) and k > 0:
                wanted = set(target)
                hits = [item in wanted for item in prediction[:k]]
                values.append(gains[: len(hits)] @ hits / gains[: len(target)].sum())
        return _mean(values)

    @staticmethod
    def hit_rate_at_k(predictions: Lists, targets: Lists, k: int) -> float:
        """Share of users with a target in the top k."""
        return _mean([not set(p[:k]).isdisjoint(t) for p, t in zip(predictions, targets) if len(t)])

    @staticmethod
    def coverage(predictions: Lists, total_items: int) -> float:
        """Number of different items recommended / total_items."""
        return len({item for prediction in predictions for item in prediction}) / total_items

    @staticmethod
    def diversity(predictions: Lists) -> float:
        """Mean Jaccard distance over all pairs of lists (`diversity`), pairs of empty lists left out."""
        if not len(predictions):
            return 0.0
        numbers = {item: number for number, item in enumerate({i for p in predictions for i in p}, start=1)}
        rows = [torch.tensor([numbers[item] for item in p], dtype=torch.int64) for p in predictions]
        return diversity(pad_sequence(rows, batch_first=True))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
