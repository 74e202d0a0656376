"""Counter-based draws: uniform, addressed by their counter alone, different for different keys."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.ops.counter_random import (
    counter_bits,
    counter_integers,
    counter_uniform,
    stream_key,
)

KEY = stream_key(42, 7)


def chi_square(counts: torch.Tensor) -> float:
    """Deviations of the statistic from its mean, in standard deviations."""
    counts = counts.double().flatten()
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("high", [2, 10, 257, 3000])
@pytest.mark.parametrize("shape", [(200_000, 1), (2000, 100), (1, 200_000)])
def test_integers_are_uniform(shape: tuple[int, int], high: int) -> None:
    drawn = counter_integers(KEY, torch.arange(shape[0]), shape[1], high)
    assert drawn.shape == shape
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < high
    assert abs(chi_square(torch.bincount(drawn.flatten(), minlength=high))) < 5


@pytest.mark.parametrize("neighbour", ["draw", "counter", "key"])
def test_neighbours_are_independent(neighbour: str) -> None:
    counters = torch.arange(20_000)
    one = counter_integers(KEY, counters, 4, 10)
    if neighbour == "draw":
        first, second = one[:, :-1], one[:, 1:]
    elif neighbour == "counter":
        first, second = one[:-1], one[1:]
    else:
        first, second = one, counter_integers(stream_key(42, 8), counters, 4, 10)
    pairs = torch.bincount((first * 10 + second).flatten(), minlength=100)
    assert abs(chi_square(pairs)) < 5


def test_every_bit_is_set_half_the_time() -> None:
    bits = counter_bits(KEY, torch.arange(4000), 25).flatten()
    shares = ((bits[:, None] >> torch.arange(33)) & 1).double().mean(0)
    assert shares[32] == 0
    assert ((shares[:32] - 0.5).abs() < 5 * 0.5 / 100_000**0.5).all()


def test_uniform() -> None:
    drawn = counter_uniform(KEY, torch.arange(1000), 100)
    assert drawn.dtype == torch.float32
    assert 0 <= float(drawn.min()) < 0.001
    assert 0.999 < float(drawn.max()) < 1
    assert abs(chi_square(torch.histc(drawn, 50, 0, 1))) < 5


def test_a_draw_depends_on_its_counter_alone() -> None:
    whole = counter_bits(KEY, torch.arange(1000), 8)
    assert torch.equal(counter_bits(KEY, torch.arange(137, 821), 8), whole[137:821])
    assert torch.equal(counter_bits(KEY, torch.tensor([900, 3, 3]), 8), whole[[900, 3, 3]])
    assert torch.equal(counter_bits(KEY, torch.arange(1000), 3), whole[:, :3])
    far = counter_bits(KEY, torch.arange(2**40, 2**40 + 5), 8)
    assert not torch.equal(far, whole[:5])
    assert counter_bits(KEY, torch.arange(0), 8).shape == (0, 8)


def test_largest_range() -> None:
    drawn = counter_integers(KEY, torch.arange(1000), 50, 2**31)
    assert int(drawn.min()) >= 0
    assert 2**31 * 0.99 < int(drawn.max()) < 2**31


def test_keys() -> None:
    keys = {stream_key(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (-1,), (2**63,)]}
    assert len(keys) == 8
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(42, 7) == KEY
    near = torch.tensor([stream_key(42, step) for step in range(2000)])
    assert ((near[:, None] >> torch.arange(64)) & 1).double().mean(0).sub(0.5).abs().max() < 5 * 0.5 / 2000**0.5


def test_the_numbers_stay_what_they_are() -> None:
    """A resumed run draws what the interrupted one would have: these may never change."""
    assert stream_key(42, 7) == -130867715618882058
    assert counter_bits(KEY, torch.tensor([0, 5]), 2).tolist() == [
        [2266924919, 4106119564],
        [1165172025, 2134050598],
    ]


@pytest.mark.gpu
def test_gpu_draws_the_same() -> None:
    counters = torch.arange(1000)
    assert torch.equal(counter_bits(KEY, counters.cuda(), 20).cpu(), counter_bits(KEY, counters, 20))
    assert torch.equal(counter_uniform(KEY, counters.cuda(), 20).cpu(), counter_uniform(KEY, counters, 20))
