"""Evaluator of exact ranks over the whole catalogue.

Batches are fixed by user order and dealt to the processes; ranks are integers and histograms of ranks are summed, so any number
of processes gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.top_lists import TopLists

MAX_SCORES = 1 << 25
"""Scores held at a time (float32: 128 MiB): users are taken in chunks so that a chunk times V stays below it."""

Score = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Scores ``[n, V]`` of a batch of the evaluation loader (columns ``item_ids``, ``lengths`` and so on)."""


@dataclass(frozen=True)
class EvaluationResult:
    """histogram: ranks over all users of all processes; see `RankHistogram.compute`. lists: metrics of the
    top-k lists, see `TopLists.compute`; empty where none were asked for."""

    histogram: RankHistogram
    lists: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        return self.histogram.compute()

    def high_rated_metrics(self) -> dict[str, float]:
        """Over the targets rated at or above the threshold alone; empty where the data have no ratings."""
        return self.histogram.compute(subset=True) if self.histogram.total(subset=True) else {}

    def all_metrics(self) -> dict[str, float]:
        """`metrics`, `high_rated_metrics` as ``high_rated_...``, then the list metrics that have no such name yet."""
        high_rated = {f"high_rated_{name}": value for name, value in self.high_rated_metrics().items()}
        ranked = {**self.metrics(), **high_rated}
        return {**ranked, **{name: value for name, value in self.lists.items() if name not in ranked}}


class Evaluator:
    """Ranks the targets of one split.

    seen_filter: "history" (everything the user had before the target, never the target itself), "window" (what the model
    saw; a repeated target is then a miss, as in the published evaluation), "none". rating_threshold: targets rated at
    or above it are also counted apart. shown: goes through the loader and shows how far it is.
    """

    def __init__(
        self,
        loader: EvaluationLoader,
        num_items: int,
        seen_filter: str,
        collectives: Collectives,
        unseen_targets: torch.Tensor | None = None,
        rating_threshold: float = 4.0,
        shown: Callable[[EvaluationLoader], Iterable[Mapping[str, torch.Tensor]]] = iter,
    ) -> None:
        self.loader, self.num_items, self.shown = loader, num_items, shown
        self.seen_filter, self.collectives = seen_filter, collectives
        self.unseen_targets, self.rating_threshold = unseen_targets, rating_threshold

    def __call__(self, score: Score, lists: TopLists | None = None) -> EvaluationResult:
        """score: gives ``[n, V]``. lists: an empty collector, filled from the same scores, for list metrics too."""
        histogram = RankHistogram(self.num_items)
        chunk = max(1, MAX_SCORES // max(self.num_items, 1))
        for batch in self.shown(self.loader):
            seen = self._seen(batch)
            for start in range(0, len(batch["target_ids"]), chunk):
                part = {name: values[start : start + chunk] for name, values in batch.items()}
                part_seen = None if seen is None else seen[start : start + chunk]
                scores, missed = score(part), self._missed(part, part_seen)
                ranks = _ranks(scores, part["target_ids"], part_seen)
                histogram.add(ranks.masked_fill(missed, self.num_items + 1), self._high_rated(part))
                if lists is not None:
                    self._add_lists(lists, scores, part, part_seen, missed)
        histogram.counts = self.collectives.sum_(histogram.counts)
        return EvaluationResult(histogram, {} if lists is None else lists.compute(self.collectives))

    def _seen(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self.seen_filter == "none":
            return None
        if self.seen_filter == "window":
            return batch["item_ids"]
        return self.loader.seen_items(batch["user_ids"].numpy() - 1)

    def _missed(self, batch: Mapping[str, torch.Tensor], seen: torch.Tensor | None) -> torch.Tensor:
        """``[n]`` bool: targets that count as a miss whatever their score."""
        missed = torch.zeros(len(batch["target_ids"]), dtype=torch.bool)
        if seen is not None and self.seen_filter == "window":
            missed |= (seen == batch["target_ids"][:, None]).any(1)
        if self.unseen_targets is not None:
            missed |= self.unseen_targets[batch["user_ids"] - 1]
        return missed

    def _add_lists(
        self,
        lists: TopLists,
        scores: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        seen: torch.Tensor | None,
        missed: torch.Tensor,
    ) -> None:
        """As in the ranks, a target stays a candidate unless it is a miss: recall@k of the lists is HR@k."""
        targets = batch["target_ids"].masked_fill(missed, 0)
        removed = None if seen is None else seen.masked_fill(seen == targets[:, None], 0)
        history = seen
        if history is None or self.seen_filter != "history":
            history = self.loader.seen_items(batch["user_ids"].numpy() - 1)
        lists.add(scores, batch["user_ids"], targets, removed, history)

    def _high_rated(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if "target_ratings" not in batch:
            return None
        return batch["target_ratings"] >= self.rating_threshold


def _ranks(scores: torch.Tensor, target_ids: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    seen = None if seen is None else seen.to(scores.device)
    return exact_ranks(scores, target_ids.to(scores.device), seen).cpu()
