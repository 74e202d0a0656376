"""Losses over the catalogue: the blocked form equals plain autograd over all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.catalogue import (
    BCE,
    CE,
    MEMORY_BYTES,
    CatalogueLoss,
    LogInCE,
    LogOutCE,
)
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.products.catalogue import Blocks
from golden_parity import assert_gradients, assert_near, load_golden
from losses_by_name import CATALOGUE_LOSSES
from memory import LargestTensor

FAMILY = {**CATALOGUE_LOSSES, "CE smoothed": lambda **kw: CE(label_smoothing=0.1, **kw)}
SMALL = 40 * 8 * 37  # bytes: 40 float64 tokens of a catalogue of 37 items


def drawn(seed: int, tokens: int = 300, items: int = 37, positives: int = 2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(items, 5, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(-1, items, (tokens, positives), generator=g)
    weights = torch.rand(tokens, positives, generator=g, dtype=dtype)
    return hidden, weight, labels, weights * (weights > 0.3)


def slow(name: str, logits, labels, weights) -> torch.Tensor:
    """The sum of the losses, one position after the other."""
    return sum(slow_row(name, *row) for row in zip(logits, labels, weights * (labels >= 0)))


def slow_row(name: str, x, row, w) -> torch.Tensor:
    others = torch.ones(len(x), dtype=torch.bool).index_fill(0, row[row >= 0], False)
    rest = x[others].exp().sum()
    pairs = {
        "CE": lambda p: x.logsumexp(0) - x[p],
        "CEWeighted": lambda p: x.logsumexp(0) - x[p],
        "SequenceLoss": lambda p: x.logsumexp(0) - x[p],
        "CE smoothed": lambda p: F.cross_entropy(x, p, label_smoothing=0.1),
        "LogOutCE": lambda p: -torch.log(x[p].exp() / (x[p].exp() + rest)),
    }
    if w.max() == 0:
        return x.new_zeros(())
    if name in pairs:
        return sum(w[k] * pairs[name](row[k]) for k in range(len(row)) if w[k] != 0)
    if name == "BCE":
        return w.max() * F.binary_cross_entropy_with_logits(x, (~others).to(x), reduction="sum")
    inside = x[row[w != 0]].exp().sum()
    return -w.max() * torch.log(inside / (inside + rest))


def gradients(value: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value * 0.7, leaves)


@pytest.mark.parametrize("memory_bytes", [2**29, SMALL, 1], ids=["one tile", "blocks", "computed twice"])
@pytest.mark.parametrize("name", FAMILY)
def test_blocks_equal_a_loop_over_positions(name, memory_bytes):
    hidden, weight, labels, weights = drawn(0, tokens=90)
    loss = FAMILY[name](memory_bytes=memory_bytes)
    output = loss(hidden, weight, labels, weights)
    with dispatch.references():
        reference = loss(hidden, weight, labels, weights)
    expected = slow(name, hidden @ weight.t(), labels, weights)
    by_leaf = gradients(expected, hidden, weight)
    for each in (output, reference):
        assert_near(each.sum, expected, 1e-12)
        for actual, wanted in zip(gradients(each.sum, hidden, weight), by_leaf):
            assert_near(actual, wanted, 1e-12)


@pytest.mark.parametrize("memory_bytes", [2**29, 4 * 9001 * 50, 4 * 9001], ids=["kept", "blocks", "computed twice"])
@pytest.mark.parametrize("name", FAMILY)
def test_tiles_of_items_equal_all_logits(name, memory_bytes):
    hidden, weight, labels, weights = drawn(1, tokens=290, items=9001, dtype=torch.float32)
    loss = FAMILY[name](memory_bytes=memory_bytes)
    output = loss(hidden, weight, labels, weights)
    total = slow(name, hidden.double() @ weight.double().t(), labels, weights.double())
    whole = total / output.weight.double()
    assert_near(output.mean().double(), whole, 1e-6)
    for actual, wanted in zip(gradients(output.mean(), hidden, weight), gradients(whole, hidden, weight)):
        assert_near(actual / wanted.abs().max(), wanted / wanted.abs().max(), 1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_are_right(name):
    hidden, weight, labels, weights = drawn(2, tokens=6, items=7)
    loss = FAMILY[name]()
    step = [1e-6 * torch.randn_like(leaf) for leaf in (hidden, weight)]
    forward = loss(hidden + step[0], weight + step[1], labels, weights).sum
    backward = loss(hidden - step[0], weight - step[1], labels, weights).sum
    slopes = torch.autograd.grad(loss(hidden, weight, labels, weights).sum, (hidden, weight))
    predicted = sum((2 * d * slope).sum() for d, slope in zip(step, slopes))
    assert_near((forward - backward) * 1e5, predicted * 1e5, 1e-4)


@pytest.mark.parametrize("tokens", [64, 10], ids=["kept", "computed twice"])
@pytest.mark.parametrize("name", FAMILY)
def test_no_tensor_is_larger_than_the_bound(name, tokens):
    hidden, weight, labels, weights = drawn(14, tokens=300, items=9001, dtype=torch.float32)
    with LargestTensor() as largest:
        output = FAMILY[name](memory_bytes=4 * 9001 * tokens)(hidden, weight, labels, weights)
        output.sum.backward()
    assert 9001 * 5 <= largest.numel <= 9001 * tokens
    assert weight.grad.abs().sum() > 0


def test_the_default_bound_holds_at_full_size():
    for tokens, items in ((14_000, 700_000), (14_000, 10_000_000), (100, 3_700), (1, 50_000_000)):
        blocks = Blocks.plan(torch.empty(tokens, 1), items, MEMORY_BYTES)
        assert 4 * blocks.elements <= MEMORY_BYTES
        assert blocks.tokens >= min(tokens, 32)


def test_ce_is_torch_cross_entropy():
    hidden, weight, labels, _ = drawn(3, positives=1, dtype=torch.float32)
    output = CE()(hidden, weight, labels[:, 0])
    expected = F.cross_entropy(hidden @ weight.t(), labels[:, 0], ignore_index=-1)
    assert_near(output.mean(), expected, 1e-6)
    assert output.weight == (labels >= 0).sum()
    assert CATALOGUE_LOSSES["CEWeighted"] is CE


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_to_count_gives_zero(name):
    hidden, weight, labels, weights = drawn(4)
    for case in ((torch.full_like(labels, -1), weights), (labels, weights * 0)):
        output = FAMILY[name]()(hidden, weight, *case)
        assert output.sum == 0
        assert output.weight == 0
        for gradient in gradients(output.sum, hidden, weight):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", FAMILY)
def test_no_tokens_is_nothing_to_count(name):
    _, weight, labels, weights = drawn(5)
    output = FAMILY[name]()(torch.empty(0, 5, dtype=torch.float64), weight, labels[:0], weights[:0])
    assert (output.sum, output.weight) == (0, 0)


@pytest.mark.parametrize("name", FAMILY)
def test_autocast_does_not_lower_the_precision(name):
    hidden, weight, labels, weights = drawn(6, dtype=torch.float32)
    plain = FAMILY[name]()(hidden, weight, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        cast = FAMILY[name]()(hidden, weight, labels, weights)
        low = FAMILY[name]()(hidden.bfloat16(), weight, labels, weights)
    assert torch.equal(cast.sum, plain.sum)
    assert low.sum.dtype == torch.float32
    (hidden_gradient,) = gradients(low.sum, hidden)
    assert hidden_gradient.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILY)
def test_nan_in_hidden_states_reaches_the_loss(name):
    hidden, weight, labels, _ = drawn(7)
    poisoned = hidden.detach().clone()
    poisoned[labels[:, 0] >= 0] *= float("nan")
    assert FAMILY[name]()(poisoned, weight, labels).sum.isnan()


@pytest.mark.parametrize("name", FAMILY)
def test_large_logits_stay_finite(name):
    hidden, weight, labels, weights = drawn(8, dtype=torch.float32)
    output = FAMILY[name]()(hidden * 1e3, weight, labels, weights)
    assert output.sum.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(output.sum, hidden, weight))


@pytest.mark.parametrize("loss", [LogInCE(), LogOutCE()])
def test_a_position_whose_labels_are_the_whole_catalogue_costs_nothing(loss):
    hidden, weight, _, _ = drawn(9, tokens=4, items=3)
    output = loss(hidden, weight, torch.arange(3).repeat(4, 1))
    assert_near(output.sum, torch.zeros((), dtype=torch.float64), 1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(output.sum, hidden, weight))


def test_values_without_gradients_are_the_same():
    hidden, weight, labels, weights = drawn(10)
    with torch.no_grad():
        silent = BCE()(hidden, weight, labels, weights)
    assert not silent.sum.requires_grad
    assert torch.equal(silent.sum, BCE()(hidden, weight, labels, weights).sum)


def test_epsilon_and_clamp_border_bound_log_in():
    hidden, weight = torch.tensor([[100.0]]), torch.tensor([[-1.0], [1.0]])
    label = torch.tensor([0])
    assert LogInCE()(hidden, weight, label).sum.item() == pytest.approx(200)
    assert LogInCE(epsilon=1e-6)(hidden, weight, label).sum.item() == pytest.approx(13.8155, rel=1e-4)
    assert LogInCE(clamp_border=90.0)(hidden, weight, label).sum.item() == 90


def test_gradients_are_given_out_once():
    hidden, weight, labels, weights = drawn(11)
    total = CE()(hidden, weight, labels, weights).sum
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("bad", [37, -2])
def test_positives_out_of_range_are_refused(bad):
    hidden, weight, labels, weights = drawn(12)
    labels[5, 1] = bad
    with pytest.raises(UserError, match=r"rows 0\.\.36"):
        CE()(hidden, weight, labels, weights)


def test_weights_of_another_shape_are_refused():
    hidden, weight, labels, weights = drawn(13)
    with pytest.raises(UserError, match="one shape"):
        CE()(hidden, weight, labels, weights[:, :1])


RECORDED: dict[str, CatalogueLoss] = {
    "replay_loss_ce": CE(),
    "replay_loss_bce": BCE(),
    "replay_loss_bce_multi": BCE(),
    "replay_loss_login_ce": LogInCE(epsilon=1e-6),
    "replay_loss_login_ce_multi": LogInCE(epsilon=1e-6),
    "replay_loss_logout_ce": LogOutCE(),
    "replay_loss_logout_ce_multi": LogOutCE(),
}


@pytest.mark.parametrize("case", RECORDED)
def test_blocked_losses_give_the_recorded_numbers(case):
    golden = load_golden(case)
    weight = golden.parameters["item_weight"].requires_grad_()
    embeddings = golden.inputs["model_embeddings"].requires_grad_()
    labels = golden.inputs["positive_labels"].flatten(0, 1)
    masks = {"loss": "target_padding_mask", "partial_loss": "partial_target_padding_mask"}
    for name, mask in masks.items():
        if name in golden.outputs:
            counted = golden.inputs[mask].flatten(0, 1)
            value = RECORDED[case](embeddings.flatten(0, 1), weight, labels, counted).mean()
            assert_near(value, golden.outputs[name], 1e-5)
            if name == golden.gradient_of:
                assert_gradients(golden, value, item_weight=weight, model_embeddings=embeddings)
