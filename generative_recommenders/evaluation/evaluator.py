"""Evaluator of exact ranks over the whole catalogue.

Batches are fixed by user order and dealt to the processes; ranks are integers, so any number of processes gives the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from generative_recommenders.data.loader import EvaluationLoader
from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.distributed.row_shards import RowShard
from generative_recommenders.distributed.signals import StopRequested
from generative_recommenders.evaluation.list_metrics import TopLists
from generative_recommenders.evaluation.metrics import RankHistogram
from generative_recommenders.evaluation.product_ranks import USERS, product_ranks
from generative_recommenders.evaluation.progress import EvaluationProgress
from generative_recommenders.evaluation.ranks import exact_ranks
from generative_recommenders.evaluation.seen_filters import SeenFilter, SeenItems
from generative_recommenders.modeling.similarity.interface import rounded
from generative_recommenders.ops import dispatch
from generative_recommenders.retrieval.product_search import search_shards

MAX_SCORES = 1 << 25
"""Scores held at a time (float32: 128 MiB): users are taken in chunks so that a chunk times V stays below it."""

Score = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Scores ``[n, V]`` of a batch of the evaluation loader (columns ``item_ids``, ``lengths`` and so on)."""


@runtime_checkable
class Ranker(Protocol):
    """Computes ranks without the scores of all items."""

    def ranks(
        self, batch: Mapping[str, torch.Tensor], target_ids: torch.Tensor, removed: SeenItems | None
    ) -> torch.Tensor:
        """``[n]`` int64, as `exact_ranks`."""


class ProductScores:
    """A `Score` that is a product. queries: of a batch, ``[n, D]``. items: ``[V, D]``.

    dtype: what products are rounded to, see `product_ranks`.
    shard: where ``items`` are those of this process alone; ``queries({})`` then takes part in looking up the other
    processes' histories, for no users of its own.
    """

    def __init__(
        self,
        queries: Score,
        items: torch.Tensor,
        shard: RowShard | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.queries, self.items, self.shard, self.dtype = queries, items, shard, dtype

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rounded(self.queries(batch) @ self.items.T, self.dtype)


def never() -> bool:
    """The stop request of what nothing stops."""
    return False


@dataclass(frozen=True)
class EvaluationResult:
    """histogram: ranks over all users of all processes; see `RankHistogram.compute`. ranks: ``[U]`` int64 of each
    user's target, V + 1 for a miss, 0 for users that were not scored. lists: metrics of the top-k lists, see
    `TopLists.compute`; empty where none were asked for. removed_targets: targets that the seen filter took out, which
    are misses."""

    histogram: RankHistogram
    ranks: torch.Tensor
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
    """Users with what their ranks need beside scores.

    user_ids: ``[B]``. batch: columns of the loader. removed: what the seen filter takes out. targets: ``[B]`` ids; of
    misses -1 where the filter takes the target out, 0 otherwise: neither is an item, so no score makes it a hit.
    """

    user_ids: torch.Tensor
    batch: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    removed: SeenItems

    def to(self, device: torch.device) -> RankedUsers:
        """Moves what a model reads to a device, except the lengths, which lay out its tokens on the host."""
        batch = {name: x if name == "lengths" else x.to(device) for name, x in self.batch.items()}
        return replace(self, batch=batch, targets=self.targets.to(device), removed=self.removed.to(device))

    def rows(self, start: int, stop: int) -> RankedUsers:
        """The users [start, stop) of these."""
        some = slice(start, stop)
        batch = {name: x[some] for name, x in self.batch.items()}
        return RankedUsers(self.user_ids[some], batch, self.targets[some], self.removed.rows_between(start, stop))

    def concatenate(self, others: RankedUsers) -> RankedUsers:
        """These users and others, whose batches have the same columns."""
        rows = torch.cat([self.removed.rows, others.removed.rows + len(self.user_ids)])
        removed = SeenItems(rows, torch.cat([self.removed.ids, others.removed.ids]))
        batch = {name: torch.cat([x, others.batch[name]]) for name, x in self.batch.items()}
        user_ids, targets = torch.cat([self.user_ids, others.user_ids]), torch.cat([self.targets, others.targets])
        return RankedUsers(user_ids, batch, targets, removed)


class Evaluator:
    """Ranks the targets of one split.

    missed_targets: ``[U]`` bool, users whose target is a miss whatever its score. rating_threshold: targets rated this
    high or higher are also counted apart. shown: iterates over the loader and shows its progress. stop: asked between
    chunks of users whether to stop, which raises StopRequested on all processes.
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
        """Result of `prepared` in an earlier evaluation, for reuse."""

    def __call__(
        self,
        score: Score | Ranker,
        lists: TopLists | None = None,
        progress: EvaluationProgress | None = None,
    ) -> EvaluationResult:
        """score: gives ``[n, V]``, or the ranks themselves. lists: an empty collector, to be filled from the same
        scores. progress: keeps the ranks of an evaluation that is stopped.
        """
        sharded = isinstance(score, ProductScores) and score.shard is not None
        measured = torch.zeros(len(self.loader.targets), dtype=torch.int64)
        # Ranks begin at 1, so that 0 stands for not ranked yet and a sum over processes joins them.
        known = torch.zeros_like(measured) if progress is None else progress.load(len(measured))
        self.loader.leave_out(known.numpy() > 0)
        for users, ranks in self._measured(score, lists):
            # One past a miss: a miss because the filter took the target out.
            measured[users.user_ids - 1] = ranks.cpu().masked_fill(users.targets.cpu() < 0, self.num_items + 2)
            # Where a catalogue is sharded, processes rank the same users together: none may leave off alone.
            leaves_off = self.collectives.any(self.stop()) if sharded else self.stop()
            if leaves_off:
                break
            if progress is not None and progress.due:
                progress.save(measured.where(measured > 0, known))
        stopping = self.collectives.any(self.stop())
        ranks = self.collectives.sum_(measured)
        ranks = ranks.where(ranks > 0, known)
        if progress is not None:
            progress.save(ranks) if stopping else progress.finish()
        if stopping:
            raise StopRequested
        removed_targets = int((ranks == self.num_items + 2).sum())
        ranks.clamp_(max=self.num_items + 1)
        of_lists = {} if lists is None else lists.compute(self.collectives)
        scored = ranks.nonzero()[:, 0]
        histogram, data = RankHistogram(self.num_items), self.loader.dataset
        high_rated = None
        if data.ratings is not None:
            events = data.offsets[scored.numpy()] + self.loader.targets[scored.numpy()]
            high_rated = torch.from_numpy(data.ratings[events]) >= self.rating_threshold
        histogram.add(ranks[scored], high_rated)
        return EvaluationResult(histogram, ranks, of_lists, removed_targets)

    def prepared(self) -> Iterator[RankedUsers]:
        """The loader's batches, each with what its ranks need beside scores."""
        for batch in self.shown(self.loader):
            user_ids, targets = batch["user_ids"], batch["target_ids"]
            pairs = self.seen_filter.removed(batch, self.loader.histories(user_ids.numpy() - 1))
            removed = SeenItems.none() if pairs is None else SeenItems.of(*pairs, self.num_items)
            taken = removed.contains(targets)
            if self.missed_targets is not None:
                targets = targets.masked_fill(self.missed_targets[user_ids - 1], 0)
            yield RankedUsers(user_ids, batch, targets.masked_fill(taken, -1), removed)

    def _measured(self, score: Score | Ranker, lists: TopLists | None) -> Iterator[tuple[RankedUsers, torch.Tensor]]:
        """Users and the ranks ``[n]`` of their targets, as they are found."""
        prepared = self.prepared() if self.kept is None else self.kept
        if isinstance(score, Ranker):
            for users in prepared:
                yield users, score.ranks(users.batch, users.targets, users.removed)
        elif isinstance(score, ProductScores) and (
            score.shard is not None or (lists is None and dispatch.fast_on_cpu(score.items))
        ):
            yield from self._by_products(score, lists, prepared)
        else:
            chunk = max(1, MAX_SCORES // max(self.num_items, 1))
            for users in prepared:
                seen_before = None if lists is None else self._seen_before_target(users)
                for start in range(0, len(users.targets), chunk):
                    part = users.rows(start, start + chunk)
                    scores = score(part.batch)
                    seen = part.removed.to(scores.device)
                    if lists is not None and seen_before is not None:
                        # A target that is removed or missed is in no list: recall@k is HR@k.
                        own = seen_before.rows_between(start, start + chunk)
                        lists.add(scores, part.user_ids, part.targets, seen, own)
                    yield part, exact_ranks(scores, part.targets.to(scores.device), seen)

    def _by_products(
        self, score: ProductScores, lists: TopLists | None, prepared: Iterable[RankedUsers]
    ) -> Iterator[tuple[RankedUsers, torch.Tensor]]:
        """Users in blocks of one size. Where the catalogue is sharded, every process ranks the users of all among its
        own items, and the main process alone yields them.
        """
        shard, is_main = score.shard, self.collectives.is_main
        if shard is not None:
            encoded = _of_all_processes(prepared, score, self.collectives)
        else:
            # Encoded in the loader's batches: states must not depend on where a stopped evaluation resumed.
            encoded = (replace(each, batch={"queries": score.queries(each.batch)}) for each in prepared)
        for users in _regrouped(encoded, USERS):
            queries = users.batch["queries"]
            there = users.to(queries.device)
            ranks = product_ranks(queries, score.items, there.targets, there.removed, shard, score.dtype)
            if lists is not None and shard is not None:
                seen = there.removed.rectangle(len(queries))
                _, ids = search_shards(queries, score.items, lists.k, shard, seen, score.dtype)
                if is_main:
                    lists.add_lists(ids.cpu(), users.user_ids, users.targets, self._seen_before_target(users))
            count = len(ranks) if shard is None or is_main else 0
            yield users.rows(0, count), ranks[:count]

    def _seen_before_target(self, users: RankedUsers) -> SeenItems:
        """Every item that the users had before their targets, not in the window alone."""
        histories = self.loader.histories(users.user_ids.numpy() - 1)
        return SeenItems.of(histories.rows, histories["item_ids"], self.num_items)


def _of_all_processes(
    prepared: Iterable[RankedUsers], score: ProductScores, collectives: Collectives
) -> Iterator[RankedUsers]:
    """Batches of all processes, one of each at a time, joined in rank order with their ``queries [n, D]``: the same on
    all."""
    batches, gather = iter(prepared), collectives.gather_variable
    none = torch.zeros(0, dtype=torch.int64)
    while collectives.any((own := next(batches, None)) is not None):
        queries = score.queries({} if own is None else own.batch)
        if own is None:
            own = RankedUsers(none, {}, none, SeenItems.none())
        sizes = gather(torch.tensor([len(own.user_ids)]))
        first = int(sizes[: collectives.rank].sum())
        pairs = own.removed.to("cpu")
        removed = SeenItems(gather(pairs.rows + first), gather(pairs.ids))
        yield RankedUsers(gather(own.user_ids), {"queries": gather(queries)}, gather(own.targets.cpu()), removed)


def _regrouped(parts: Iterable[RankedUsers], size: int) -> Iterator[RankedUsers]:
    """The same users in order, ``size`` at a time."""
    waiting: RankedUsers | None = None
    for part in parts:
        waiting = part if waiting is None else waiting.concatenate(part)
        while len(waiting.user_ids) >= size:
            yield waiting.rows(0, size)
            waiting = waiting.rows(size, len(waiting.user_ids))
    if waiting is not None and len(waiting.user_ids):
        yield waiting
