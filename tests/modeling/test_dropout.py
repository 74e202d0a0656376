"""Dropout: rate, scale, seed, and the elements behind the last whole word of random bits."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.modeling.dropout import Dropout, KeepMasks, dropout

RATES = [0.05, 0.2, 0.5, 0.9]


@pytest.mark.parametrize("rate", RATES)
def test_rate_and_scale(rate: float) -> None:
    torch.manual_seed(3)
    kept = KeepMasks(rate, torch.empty(0)).draw((400, 1001))
    assert kept.unique().tolist() == [0.0, 1.0]
    spread = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs((kept == 0).float().mean().item() - rate) < 5 * spread
    scale = torch.tensor(1.0) * (1.0 / (1.0 - rate))
    assert dropout(torch.ones(100), rate, training=True).unique().tolist() == [0.0, scale.item()]


@pytest.mark.parametrize("rate", RATES)
def test_every_place_of_a_word_is_dropped_as_often(rate: float) -> None:
    torch.manual_seed(4)
    zeros = KeepMasks(rate, torch.empty(0)).draw((20_000, 4)) == 0
    spread = (rate * (1 - rate) / 20_000) ** 0.5
    assert ((zeros.float().mean(0) - rate).abs() < 5 * spread).all()
    correlations = torch.corrcoef(zeros.T.float()) - torch.eye(4)
    assert correlations.abs().max() < 5 / 20_000**0.5


def test_seed_decides() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(KeepMasks(0.5, torch.empty(0)).draw((30, 7)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], KeepMasks(0.5, torch.empty(0)).draw((30, 7)))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,), (2, 3, 1)])
def test_shape_and_dtype(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        kept = KeepMasks(0.5, torch.empty(0, dtype=dtype)).draw(shape)
        assert (kept.shape, kept.dtype) == (torch.Size(shape), dtype)
        assert ((kept == 0) | (kept == 1)).all()


def test_gradient_passes_through_the_same_mask() -> None:
    x = torch.ones(50, 3, requires_grad=True)
    y = dropout(x, 0.4, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert (y == 0).any()


def test_no_dropout_in_evaluation_or_at_rate_0() -> None:
    x = torch.rand(4, 4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    module = Dropout(0.5)
    assert module.eval()(x) is x
    assert (module.train()(torch.ones(100)) == 0).any()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Dropout(rate)
