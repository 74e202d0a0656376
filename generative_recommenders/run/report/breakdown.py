"""Metrics of a run over its users and over groups of them, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import polars as pl

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.significance import bootstrap_interval, holm, paired_permutation
from generative_recommenders.run.report.facts import RANK, Facts
from generative_recommenders.run.summary import COLUMNS

GROUPS, FEWEST_TARGETS, MOST_GENRES = 5, 20, 20


@dataclass(frozen=True)
class Interval:
    """A mean over users and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        """values: one a user, at least one."""
        return cls(float(values.mean()), *bootstrap_interval(values))


@dataclass(frozen=True)
class Group:
    """Targets of one kind. values: by method."""

    label: str
    targets: int
    values: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Two methods over the same users. difference: of the first to the second; p: adjusted over all comparisons of a
    table."""

    first: str
    second: str
    metric: str
    difference: Interval
    p: float


def user_values(ranks: np.ndarray, metric: str, num_items: float) -> np.ndarray:
    """``[n]`` float64: what each user adds to a metric (`evaluation.metrics.RankHistogram`). ranks: ``[n]``, V + 1 a
    miss."""
    if metric == "mrr":
        return 1.0 / ranks
    name, _, cutoff = metric.partition("@")
    hit = ranks <= min(int(cutoff), num_items)
    return hit / np.log2(ranks + 1.0) if name == "ndcg" else hit.astype(np.float64)


def results(facts: Facts) -> dict[str, dict[str, Interval]]:
    """Metrics by method, over the kept users."""
    return {
        method: {metric: Interval.of(user_values(facts.ranks(method), metric, facts.num_items)) for metric in COLUMNS}
        for method in facts.methods
    }


def by_size(facts: Facts, column: str, metric: str) -> list[Group]:
    """Groups of about as many targets each, by a number of each target."""
    sizes = facts.users[column].to_numpy()
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, GROUPS + 1)[1:-1], method="inverted_cdf"))
    place = np.searchsorted(edges, sizes)
    members: dict[str, np.ndarray] = {}
    for number in np.unique(place):
        rows = np.flatnonzero(place == number)
        low, high = int(sizes[rows].min()), int(sizes[rows].max())
        members[f"{low:,}" if low == high else f"{low:,}–{high:,}"] = rows
    return _groups(facts, metric, members)


def by_genre(facts: Facts, metric: str) -> list[Group]:
    """The genres of most targets; a target counts in each of its genres. Genres of few targets are left out."""
    genres = facts.items.select("item_id", "genres")
    targets = facts.users.select("item_id").with_row_index("row").join(genres, on="item_id", how="left")
    pairs = targets.explode("genres").drop_nulls("genres").group_by("genres").agg(pl.col("row").unique().sort())
    rows = {name: np.array(rows) for name, rows in pairs.iter_rows() if len(rows) >= FEWEST_TARGETS}
    largest = sorted(rows, key=lambda name: (-len(rows[name]), name))[:MOST_GENRES]
    return _groups(facts, metric, {name: rows[name] for name in largest})


def _groups(facts: Facts, metric: str, members: Mapping[str, np.ndarray]) -> list[Group]:
    """The groups of the targets in these rows, by label; an empty list where there is one group alone."""
    if len(members) < 2:
        return []
    values = {method: user_values(facts.ranks(method), metric, facts.num_items) for method in facts.methods}
    return [
        Group(label, len(rows), {method: Interval.of(own[rows]) for method, own in values.items()})
        for label, rows in members.items()
    ]


def compared(
    ranks: Mapping[str, np.ndarray], num_items: int, metrics: Sequence[str], to_first: bool = False
) -> list[Comparison]:
    """Every pair of methods, or the first with each other, by paired permutation tests; p by Holm over all of them.

    ranks: by method, ``[n]``, entry i of all is one user's.
    """
    pairs = [(a, b) for a, b in combinations(ranks, 2) if not to_first or a == next(iter(ranks))]
    found = []
    for first, second in pairs:
        for metric in metrics:
            a, b = (user_values(ranks[name], metric, num_items) for name in (first, second))
            found.append((first, second, metric, Interval.of(a - b), paired_permutation(a, b)))
    adjusted = holm([each[-1] for each in found])
    return [Comparison(*each[:-1], p) for each, p in zip(found, adjusted)]


def of_common_users(runs: Mapping[str, Facts]) -> Facts:
    """The users whom all runs measured, by id and target, with the runs as methods. UserError without one."""
    first = next(iter(runs.values()))
    common = first.users.select("user_id", "item_id", "history_length", "item_events")
    for name, facts in runs.items():
        own = facts.users.select("user_id", "item_id", pl.col(RANK + facts.methods[0]).alias(RANK + name))
        common = common.join(own, on=["user_id", "item_id"], how="inner")
    if not len(common):
        raise UserError("the runs have measured no user in common: their numbers do not compare")
    return replace(first, users=common.sort("user_id"))
