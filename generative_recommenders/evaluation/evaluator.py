"""Evaluator of exact ranks over the whole catalogue.

Batches are fixed by user order and dealt to the processes; ranks are integers and histograms of ranks are summed, so any number
of processes gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile

import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.signals import StopRequested
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenFilter
from generative_recommenders.evaluation.seen_items import SeenItems
from generative_recommenders.evaluation.top_lists import TopLists

MAX_SCORES = 1 << 25
"""Scores held at a time (float32: 128 MiB): users are taken in chunks so that a chunk times V stays below it."""

Score = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Scores ``[n, V]`` of a batch of the evaluation loader (columns ``item_ids``, ``lengths`` and so on)."""

Record = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes users, their targets and the ranks of these, ``[n]`` int64 each; V + 1 for a miss."""


def never() -> bool:
    """The stop request of what nothing stops."""
    return False


@dataclass(frozen=True)
class EvaluationResult:
    """histogram: ranks over all users of all processes; see `RankHistogram.compute`. lists: metrics of the
    top-k lists, see `TopLists.compute`; empty where none were asked for. removed_targets: targets that the seen filter took
    out, which are misses."""

    histogram: RankHistogram
    lists: dict[str, float] = field(default_factory=dict)
    removed_targets: int = 0

    @property
    def targets(self) -> int:
        """Number of targets."""
        return self.histogram.total()

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


@dataclass(frozen=True)
class RankedUsers:
    """A batch of the loader with what its ranks need beside scores.

    targets: ``[B]`` ids, 0 (no item, so a miss) for the missed ones. removed: what the seen filter takes out; removed_targets:
    how many of the targets are among that. high_rated: ``[B]`` bool, or None without ratings.
    """

    batch: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    removed: SeenItems | None
    removed_targets: int
    high_rated: torch.Tensor | None

    def to(self, device: torch.device) -> RankedUsers:
        """The same with all that a model reads on a device, but for the lengths, which lay out its tokens."""
        batch = {name: x if name == "lengths" else x.to(device) for name, x in self.batch.items()}
        removed = None if self.removed is None else self.removed.to(device)
        return replace(self, batch=batch, targets=self.targets.to(device), removed=removed)


class Evaluator:
    """Ranks the targets of one split.

    missed_targets: ``[U]`` bool, users whose target is a miss whatever its score. rating_threshold: targets rated at
    or above it are also counted apart. shown: goes through the loader and shows how far it is.
    stop: asked between chunks of users whether to leave off, which raises StopRequested on all processes.
    """

    def __init__(
        self,
        loader: EvaluationLoader,
        num_items: int,
        seen_filter: SeenFilter,
        collectives: Collectives,
        missed_targets: torch.Tensor | None = None,
        rating_threshold: float = 4.0,
        shown: Callable[[EvaluationLoader], Iterable[Mapping[str, torch.Tensor]]] = iter,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.loader, self.num_items, self.shown, self.stop = loader, num_items, shown, stop
        self.seen_filter, self.collectives = seen_filter, collectives
        self.missed_targets, self.rating_threshold = missed_targets, rating_threshold
        self.kept: Iterable[RankedUsers] | None = None
        """What `prepared` gave in an evaluation before, to be taken again."""

    def __call__(
        self, score: Score, lists: TopLists | None = None, record: Record | None = None
    ) -> EvaluationResult:
        """score: gives ``[n, V]``. lists: an empty collector, filled from the same scores, for list metrics too.
        record: called with this process's users, targets and ranks as they are measured.
        """
        histogram = RankHistogram(self.num_items)
        removed_targets = 0
        chunk = max(1, MAX_SCORES // max(self.num_items, 1))
        until_stopped = partial(takewhile, lambda _: not self.stop())
        for users in until_stopped(self.prepared() if self.kept is None else self.kept):
            removed_targets += users.removed_targets
            if lists is not None:
                histories = self.loader.histories(users.batch["user_ids"].numpy() - 1)
                had = SeenItems.of(histories.rows, histories["item_ids"], self.num_items)
            for start in until_stopped(range(0, len(users.targets), chunk)):
                rows = slice(start, start + chunk)
                part = {name: values[rows] for name, values in users.batch.items()}
                scores, seen = score(part), users.removed
                if seen is not None:
                    seen = seen.rows_between(start, start + chunk).to(scores.device)
                ranks = exact_ranks(scores, users.targets[rows].to(scores.device), seen).cpu()
                histogram.add(ranks, None if users.high_rated is None else users.high_rated[rows])
                if record is not None:
                    record(part["user_ids"].cpu(), part["target_ids"].cpu(), ranks)
                if lists is not None:  # a target that is removed or missed is in no list: recall@k is HR@k
                    own = had.rows_between(start, start + chunk)
                    lists.add(scores, part["user_ids"], users.targets[rows], seen, own)
        if self.collectives.any(self.stop()):
            raise StopRequested
        histogram.counts = self.collectives.sum_(histogram.counts)
        count = int(self.collectives.sum_(torch.tensor([removed_targets])))
        return EvaluationResult(histogram, {} if lists is None else lists.compute(self.collectives), count)

    def prepared(self) -> Iterator[RankedUsers]:
        """The loader's batches, each with what its ranks need beside scores."""
        for batch in self.shown(self.loader):
            pairs = self.seen_filter.removed(batch, self.loader.histories(batch["user_ids"].numpy() - 1))
            removed = None if pairs is None else SeenItems.of(*pairs, self.num_items)
            count = 0 if removed is None else int(removed.contains(batch["target_ids"]).sum())
            yield RankedUsers(batch, self._targets(batch), removed, count, self._high_rated(batch))

    def _targets(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[B]`` target ids, 0 (no item, so a miss) for the missed ones."""
        if self.missed_targets is None:
            return batch["target_ids"]
        return batch["target_ids"].masked_fill(self.missed_targets[batch["user_ids"] - 1], 0)

    def _high_rated(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if "target_ratings" not in batch:
            return None
        return batch["target_ratings"] >= self.rating_threshold
