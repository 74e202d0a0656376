"""Dropout: rate, scale, seed, and the elements after the last whole word of random bits."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same, fast_and_reference
from generative_recommenders.ops.dropout import Dropout, KeepMasks, dropout

RATES = [0.05, 0.2, 0.5, 0.9]
LEVELS = 256


def draws(rate: float, sources: int, count: int) -> torch.Tensor:
    """``[sources, count]``"""
    return torch.stack([KeepMasks(rate, torch.empty(0)).draw((count,)) for _ in range(sources)])


@pytest.mark.parametrize("rate", [*RATES, 0.001, 0.9999])
def test_rate_over_many_sources_and_within_one(rate: float) -> None:
    torch.manual_seed(3)
    kept = draws(rate, 2000, 1001)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    beyond_a_level = rate * LEVELS % 1
    variance = rate * (1 - rate) / kept.numel() + beyond_a_level * (1 - beyond_a_level) / LEVELS**2 / len(kept)
    assert abs((kept == 0).double().mean().item() - rate) < 5 * variance**0.5
    of_one = (KeepMasks(rate, torch.empty(0)).draw((400_000,)) == 0).double().mean().item()
    assert abs(of_one - rate) < 1 / LEVELS + 5 * (rate * (1 - rate) / 400_000) ** 0.5


@pytest.mark.parametrize("rate", RATES)
def test_scale(rate: float) -> None:
    scale = torch.tensor(1.0) * (1.0 / (1.0 - rate))
    assert dropout(torch.ones(100), rate, training=True).unique().tolist() == [0.0, scale.item()]


@pytest.mark.parametrize("rate", RATES)
def test_every_place_of_a_word_is_dropped_as_often(rate: float) -> None:
    torch.manual_seed(4)
    zeros = draws(rate, 400, 400).view(-1, 8) == 0
    spread = (rate * (1 - rate) / len(zeros)) ** 0.5
    assert ((zeros.float().mean(0) - rate).abs() < 6 * spread).all()
    correlations = torch.corrcoef(zeros.T.float()) - torch.eye(8)
    assert correlations.abs().max() < 5 / len(zeros) ** 0.5


def test_seed_decides() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(KeepMasks(0.5, torch.empty(0)).draw((30, 7)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], KeepMasks(0.5, torch.empty(0)).draw((30, 7)))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_added_and_not_dropped(dtype: torch.dtype) -> None:
    x, residual = torch.rand(40, 3).to(dtype).requires_grad_(), torch.rand(40, 3, requires_grad=True)
    torch.manual_seed(5)
    alone = dropout(x, 0.3, training=True)
    torch.manual_seed(5)
    y = dropout(x, 0.3, training=True, residual=residual)
    torch.testing.assert_close(y, alone + residual, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones(40, 3))
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad == 0, alone == 0)
    assert torch.equal(dropout(x, 0.3, training=False, residual=residual), x + residual)


@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_its_reference_with_gradients_under_one_mask(with_residual: bool) -> None:
    x = torch.randn(41, 3, requires_grad=True)
    residual = torch.randn(41, 3, requires_grad=True) if with_residual else None
    fast, reference = fast_and_reference(lambda: dropout(x, 0.3, training=True, residual=residual))
    assert isinstance(fast.grad_fn, torch.autograd.function.BackwardCFunction)
    assert not isinstance(reference.grad_fn, torch.autograd.function.BackwardCFunction)
    assert_same(fast, reference, [x] if residual is None else [x, residual])


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
