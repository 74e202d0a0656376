"""Uncertainty of metrics over users: bootstrap intervals, paired permutation tests, Holm's correction.

A metric is a mean over users. Each function takes one number a user; equal numbers are drawn together, as one binomial
or multinomial count, which is the same distribution as a draw for each user and costs no more for a million of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2_000
PERMUTATIONS = 10_000
_CELLS = 1 << 22
"""Counts held at a time."""


def bootstrap_interval(
    values: ArrayLike, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: users are drawn anew with replacement.

    values: ``[n]``, one a user, finite. Returns the (1 - level) / 2 and (1 + level) / 2 quantiles of ``resamples``
    means; the same seed gives the same interval. ValueError without users. Efron and Tibshirani, An Introduction to the
    Bootstrap, 13.3.
    """
    distinct, counts = _distinct(_users(values))
    n, rng = counts.sum(), np.random.default_rng(seed)
    means = [rng.multinomial(n, counts / n, size=size) @ distinct / n for size in _blocks(resamples, len(distinct))]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_permutation(a: ArrayLike, b: ArrayLike, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of the difference of two means over the same users.

    a, b: ``[n]``, entry i of both is one user's. Where the two methods are alike, each difference could as well have
    had the other sign: p is the share of random signs, the true ones included, whose sum is at least as far from 0. The
    same seed gives the same p; it is never below 1 / (permutations + 1). ValueError where the lengths differ. Smucker
    et al., A Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007.
    """
    first, second = _users(a), _users(b)
    if len(first) != len(second):
        raise ValueError(f"paired values of {len(first)} and of {len(second)} users")
    differences = first - second
    sizes, counts = _distinct(np.abs(differences[differences != 0]))
    rng = np.random.default_rng(seed)
    # Sums that are equal but for the order of their additions are as far from 0.
    observed = abs(differences.sum()) - 1e-9 * (sizes @ counts)
    extreme = 0
    for size in _blocks(permutations, len(sizes)):
        signs = 2 * rng.binomial(counts, 0.5, size=(size, len(sizes))) - counts
        extreme += int((np.abs(signs @ sizes) >= observed).sum())
    return (extreme + 1) / (permutations + 1)


def holm(p_values: Sequence[float] | np.ndarray) -> list[float]:
    """Holm's adjusted p-values ``[m]``, in the order given: below alpha where a hypothesis is rejected while the chance
    of any false rejection among the m stays below alpha. Holm, A Simple Sequentially Rejective Multiple Test Procedure,
    1979."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(each) for each in adjusted.clip(max=1.0)]


def _users(values: Any) -> np.ndarray:
    users = np.asarray(values, np.float64)
    if users.ndim != 1 or not len(users) or not np.isfinite(users).all():
        raise ValueError(f"one finite number for each of at least one user is needed, got {users.shape}")
    return users


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values and how often each occurs. Means over seeds may differ in their last bits by the order in
    which they were added; as two values they would draw other samples."""
    return np.unique(values.round(12), return_counts=True)


def _blocks(draws: int, width: int) -> Iterator[int]:
    """Sizes of blocks of draws that hold at most `_CELLS` counts each."""
    size = max(_CELLS // max(width, 1), 1)
    for start in range(0, draws, size):
        yield min(size, draws - start)
