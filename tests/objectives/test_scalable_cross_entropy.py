"""SCE: recorded numbers, the full softmax as its limit, and its rules."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.sce import ScalableCrossEntropyLoss
from golden_parity import assert_gradients, assert_near, load_golden


def drawn(seed: int, tokens: int = 20, items: int = 15):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=g).requires_grad_()
    weight = torch.randn(items, 6, generator=g).requires_grad_()
    labels = torch.randint(0, items, (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g)
    return hidden, weight, labels, weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_recorded_numbers():
    golden = load_golden("replay_sce")
    config, inputs = golden.config, golden.inputs
    weight = golden.parameters["item_weight"].requires_grad_()
    embeddings = inputs["model_embeddings"].requires_grad_()
    flat, labels = embeddings.flatten(0, 1), inputs["positive_labels"].flatten()
    real, masked = inputs["padding_mask"].flatten(), inputs["tokens_mask"].flatten()

    def value(mix_x: bool, normals: str, counted: torch.Tensor) -> torch.Tensor:
        sizes = config["n_buckets"], config["bucket_size_x"], config["bucket_size_y"]
        loss = ScalableCrossEntropyLoss(*sizes, mix_x)
        return loss(flat, weight, labels, counted, selectable=real, normals=inputs[normals]).mean()

    assert_near(value(True, "randn_mix", real), golden.outputs["loss_mix_x"], 1e-5)
    assert_near(value(False, "randn_plain", real & ~masked), golden.outputs["loss_tokens_mask"], 1e-5)
    plain = value(False, "randn_plain", real)
    assert_near(plain, golden.outputs["loss"], 1e-5)
    assert_gradients(golden, plain, item_weight=weight, model_embeddings=embeddings)


@pytest.mark.parametrize("mix_x", [False, True])
def test_buckets_of_everything_are_the_full_softmax(mix_x):
    hidden, weight, labels, weights = drawn(0)
    loss = ScalableCrossEntropyLoss(3, 100, 100, mix_x)
    output = loss(hidden, weight, labels, weights, generator())
    rows = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    assert_near(output.sum, (weights * rows).sum(), 1e-5)
    assert_near(output.weight, weights.sum(), 1e-6)


def test_buckets_follow_the_generator():
    scene = drawn(1)
    loss = ScalableCrossEntropyLoss(2, 4, 3)
    first, again, other = (loss(*scene, generator(seed)).sum for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_without_weight_or_label_are_chosen_last_and_never_count():
    hidden, weight, labels, weights = drawn(2)
    weights = torch.ones_like(weights)
    weights[:8], labels[8:12] = 0, -1
    output = ScalableCrossEntropyLoss(4, 8, 15)(hidden, weight, labels, weights, generator())
    assert output.weight == 8
    gradient = torch.autograd.grad(output.sum, hidden)[0]
    assert torch.equal(gradient[:12], torch.zeros(12, 6))
    assert (gradient[12:].abs().sum(1) > 0).all()


def test_nothing_to_count_gives_zero():
    hidden, weight, labels, weights = drawn(3)
    output = ScalableCrossEntropyLoss(2, 4, 3)(hidden, weight, labels, weights * 0, generator())
    assert (output.sum, output.weight) == (0, 0)


def test_autocast_does_not_lower_the_precision():
    scene = drawn(4)
    loss = ScalableCrossEntropyLoss(2, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(*scene, generator()).sum
    assert torch.equal(cast, loss(*scene, generator()).sum)


def test_nan_hidden_states_give_a_nan_loss():
    hidden, *rest = drawn(5)
    output = ScalableCrossEntropyLoss(2, 4, 3)(hidden * float("nan"), *rest, generator())
    assert output.sum.isnan()


def test_bad_input_is_refused():
    hidden, weight, labels, weights = drawn(6)
    loss = ScalableCrossEntropyLoss(2, 4, 3)
    with pytest.raises(UserError, match="sce.n_buckets must be 1 or more, got 0"):
        ScalableCrossEntropyLoss(0, 4, 3)
    with pytest.raises(UserError, match="positives"):
        loss(hidden, weight, labels + 15, weights)
    with pytest.raises(UserError, match="one positive for each token"):
        loss(hidden, weight, labels[:, None].repeat(1, 2), weights[:, None].repeat(1, 2))
    with pytest.raises(UserError, match="normal numbers"):
        loss(hidden, weight, labels, weights, normals=torch.zeros(3, 6))
