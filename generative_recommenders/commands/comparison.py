"""Comparison of runs by the ranks of their users' test targets, users matched by id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.significance import bootstrap_interval, paired_permutation
from generative_recommenders.run.report import breakdown

METRICS = ("ndcg@10", "hr@10", "mrr")


def user_values(ranks: pl.DataFrame, metric: str, num_items: int | None) -> pl.DataFrame:
    """``user_id, item_id, value``: what each user adds to the mean. ranks: of `evaluate.users_frame`, empty for a miss.

    metric: ``hr@K``, ``ndcg@K`` or ``mrr``. num_items: V, of which a miss has rank V + 1; None, of records that do not
    say, counts a miss as 0 in MRR too.
    """
    last = math.inf if num_items is None else num_items
    found = ranks["rank"].cast(pl.Float64).fill_null(last + 1).to_numpy()
    return ranks.select("user_id", "item_id", pl.Series("value", breakdown.user_values(found, metric, last)))


def mean_over_runs(runs: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """`user_values` averaged over runs of one configuration, as over seeds."""
    together = pl.concat(runs)
    return together.group_by("user_id", "item_id", maintain_order=True).agg(pl.col("value").mean())


class Difference(NamedTuple):
    """Means of two methods over the same users, the 95 % interval of their difference and the p-value of its test."""

    users: int
    first: float
    second: float
    interval: tuple[float, float]
    p: float


def compare(first: pl.DataFrame, second: pl.DataFrame, names: tuple[str, str]) -> Difference:
    """The paired test of two methods. first, second: of `user_values`.

    UserError where they have no user in common, or other targets for the same ones. names: of the two, for that line.
    """
    both = first.join(second, on="user_id", suffix="_second")
    if not len(both):
        raise UserError(f"{names[0]} and {names[1]} have no test user in common: there is nothing to compare")
    other = both.filter(pl.col("item_id") != pl.col("item_id_second"))
    if len(other):
        raise UserError(
            f"{names[0]} and {names[1]} have other test targets for {len(other)} of {len(both)} users, as for "
            f"{other['user_id'][0]!r}: compare runs on the same data"
        )
    a, b = both["value"].to_numpy(), both["value_second"].to_numpy()
    return Difference(len(both), float(a.mean()), float(b.mean()), bootstrap_interval(a - b), paired_permutation(a, b))


def comparison_table(first: pl.DataFrame, second: pl.DataFrame, names: tuple[str, str], num_items: int) -> str:
    """Text table of the paired tests of two runs by the main metrics. first, second: ranks of
    `evaluate.users_frame`. num_items: of both."""
    tests = {m: compare(user_values(first, m, num_items), user_values(second, m, num_items), names) for m in METRICS}
    users = next(iter(tests.values())).users
    lines = [
        f"this run against {names[1]}, {users:,} users of both, two-sided paired permutation test:",
        f"{'':<9}{'this run':>10}{'other':>10}{'difference':>12}{'95 % interval':>20}{'p':>9}",
    ]
    for metric, test in tests.items():
        low, high = test.interval
        lines.append(
            f"{metric:<9}{test.first:>10.4f}{test.second:>10.4f}{test.first - test.second:>+12.4f}"
            f"{f'{low:+.4f} .. {high:+.4f}':>20}{test.p:>9.4f}"
        )
    return "\n".join(lines)
