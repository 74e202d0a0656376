"""genrec's list metrics under their documented names."""

from __future__ import annotations

import numpy as np
import torch

from generative_recommenders.evaluation.list_metrics import diversity


class RecommendationMetrics:
    """List-based functions on plain Python lists of any hashable ids, as genrec documents them.

    Users without targets are left out (precision counts them), lists may be shorter than k, and 0.0 is
    returned where no user counts. As documented there, ndcg counts an item repeated in a list each time.
    """

    @staticmethod
    def recall_at_k(predictions: list[list[int]], targets: list[list[int]], k: int) -> float:
        """Mean of |top k and targets| / |targets|."""
        return _mean([len(set(p[:k]) & set(t)) / len(set(t)) for p, t in zip(predictions, targets) if len(t)])

    @staticmethod
    def precision_at_k(predictions: list[list[int]], targets: list[list[int]], k: int) -> float:
        """Mean of |top k and targets| / k; 0.0 for k = 0."""
        return _mean([len(set(p[:k]) & set(t)) / k for p, t in zip(predictions, targets) if k])

    @staticmethod
    def ndcg_at_k(predictions: list[list[int]], targets: list[list[int]], k: int) -> float:
        """Mean of DCG@k over the DCG of min(|targets|, k) hits in a row, with gains 1 / log2(rank + 1)."""
        values = []
        for prediction, target in zip(predictions, targets):
            wanted = set(target)
            ideal = sum(1 / np.log2(r + 2) for r in range(min(len(target), k)))
            gain = sum(1 / np.log2(r + 2) for r, item in enumerate(prediction[:k]) if item in wanted)
            if wanted:
                values.append(gain / ideal if ideal > 0 else 0.0)
        return _mean(values)

    @staticmethod
    def hit_rate_at_k(predictions: list[list[int]], targets: list[list[int]], k: int) -> float:
        """Share of users with a target in the top k."""
        return _mean([float(bool(set(p[:k]) & set(t))) for p, t in zip(predictions, targets) if len(t)])

    @staticmethod
    def coverage(predictions: list[list[int]], total_items: int) -> float:
        """Number of different items recommended / total_items."""
        return len({item for prediction in predictions for item in prediction}) / total_items

    @staticmethod
    def diversity(predictions: list[list[int]]) -> float:
        """Mean Jaccard distance over all pairs of lists (`diversity`), pairs of empty lists left out."""
        codes: dict[int, int] = {}
        rows = [[codes.setdefault(item, len(codes) + 1) for item in prediction] for prediction in predictions]
        width = max((len(row) for row in rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        return diversity(torch.tensor(padded, dtype=torch.int64).view(len(rows), width))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
