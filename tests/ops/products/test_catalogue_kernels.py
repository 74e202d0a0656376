"""The kernels of catalogue losses against logits that are written out, in Triton's interpreter where there is no
GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from generative_recommenders.ops.products import catalogue_kernels
from generative_recommenders.ops.products.catalogue import LOGSUMEXP, SOFTPLUS_SUM, row_statistic_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("tokens", "items", "width"), [(1, 3, 1), (70, 200, 50), (5, 1100, 16), (130, 65, 100)])
@pytest.mark.parametrize("exponential", [True, False], ids=["softmax", "softplus"])
@pytest.mark.parametrize("positives", [0, 1, 3])
def test_statistic_and_its_gradients(tokens: int, items: int, width: int, exponential: bool, positives: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    weight = torch.randn(items, width, device=DEVICE, requires_grad=True)
    excluded = torch.randint(-1, items, (tokens, positives), device=DEVICE) if positives else None
    found = catalogue_kernels.statistic(hidden, weight, excluded, exponential)
    statistic = LOGSUMEXP if exponential else SOFTPLUS_SUM
    expected = row_statistic_reference(hidden, weight, excluded, statistic)
    grad = torch.randn_like(expected).masked_fill(expected.isinf(), 0.0)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **close)
    theirs = [x.nan_to_num() for x in torch.autograd.grad(expected, (hidden, weight), grad)]
    for ours, reference_grad in zip(torch.autograd.grad(found, (hidden, weight), grad), theirs):
        torch.testing.assert_close(ours, reference_grad, **close)


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(100, 32, device=DEVICE, requires_grad=True)
    weight = torch.randn(700, 32, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        found = catalogue_kernels.statistic(hidden, weight, None, True)
        runs.append([found, *torch.autograd.grad(found.sum(), (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_tokens_without_any_item_and_states_that_are_no_numbers() -> None:
    hidden = torch.ones(2, 16, device=DEVICE, requires_grad=True)
    excluded = torch.tensor([[0], [-1]], device=DEVICE)
    found = catalogue_kernels.statistic(hidden, torch.ones(1, 16, device=DEVICE), excluded, True)
    assert found.tolist() == [-torch.inf, 16.0]
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad[0].tolist() == [0.0] * 16
    broken = torch.full((1, 16), torch.nan, device=DEVICE)
    for exponential in (True, False):
        lost = catalogue_kernels.statistic(broken, torch.ones(5, 16, device=DEVICE), None, exponential)
        assert bool(lost.isnan().all())
