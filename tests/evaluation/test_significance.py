"""Bootstrap intervals, permutation tests and Holm's correction, against enumeration and simulation."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from generative_recommenders.evaluation.significance import bootstrap_interval, holm, paired_permutation


def exact_p(a: np.ndarray, b: np.ndarray) -> float:
    """By all 2^n signs."""
    differences = a - b
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return float(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12))


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.random(200) < 0.3, seed, level=0.9, resamples=500)
        covered += low <= 0.3 <= high
    assert 0.85 < covered / 300 < 0.95


def test_the_interval_is_that_of_users_drawn_one_by_one() -> None:
    rng = np.random.default_rng(1)
    values = rng.exponential(size=40)
    means = values[rng.integers(0, 40, (20_000, 40))].mean(axis=1)
    found = bootstrap_interval(values, resamples=20_000)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=0.02)


def test_the_order_in_which_seeds_are_added_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    a, b, c = 1 / np.log2(rng.integers(2, 12, (3, 500)))
    first, second = (a + b + c) / 3, (c + b + a) / 3
    assert (first != second).any() and np.allclose(first, second)
    assert bootstrap_interval(first) == bootstrap_interval(second)
    assert paired_permutation(first, a) == paired_permutation(second, a)


def test_equal_users_leave_no_doubt() -> None:
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_p_is_that_of_all_signs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.4, 1, 10), rng.normal(0, 1, 10)
    assert paired_permutation(a, b, permutations=20_000) == pytest.approx(exact_p(a, b), abs=0.012)
    hits, others = rng.integers(0, 2, 12), rng.integers(0, 2, 12)
    found = paired_permutation(hits, others, permutations=20_000)
    assert found == pytest.approx(exact_p(hits, others), abs=0.012)


def test_p_is_even_where_methods_are_alike() -> None:
    rng = np.random.default_rng(2)
    p = [paired_permutation(*rng.normal(size=(2, 50)), seed, permutations=500) for seed in range(400)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.08 and 0.45 < np.mean(p) < 0.55


def test_the_same_values_differ_in_nothing() -> None:
    assert paired_permutation([0.1, 0.2], [0.1, 0.2]) == 1.0


def test_a_large_difference_has_the_smallest_p_that_the_draws_allow() -> None:
    assert paired_permutation(np.ones(100), np.zeros(100), permutations=999) == 1 / 1000


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 30))
    assert bootstrap_interval(a, 4) == bootstrap_interval(a, 4) != bootstrap_interval(a, 5)
    assert paired_permutation(a, b, 4) == paired_permutation(a, b, 4) != paired_permutation(a, b, 5)


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("wrong", [[], [np.nan], [[1.0]]])
def test_what_is_no_number_a_user_is_refused(wrong: list) -> None:
    with pytest.raises(ValueError, match="one finite number"):
        bootstrap_interval(wrong)


def test_pairs_of_different_users_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and of 1 users"):
        paired_permutation([1, 2], [1])


def test_a_million_users_cost_seconds() -> None:
    ranks = np.random.default_rng(0).integers(1, 5000, 1_000_000)
    began = time.perf_counter()
    bootstrap_interval(1 / ranks, resamples=500)
    paired_permutation(ranks <= 10, ranks % 7 == 0)
    assert time.perf_counter() - began < 20
