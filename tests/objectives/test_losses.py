"""Sampled losses: against plain formulas, against recorded numbers, and on extreme input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses.sampled import (
    BCELoss,
    BCELossWithRatings,
    BCESampled,
    GBCELoss,
    LogInCESampled,
    SampledLoss,
    SampledSoftmaxLoss,
)
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.products.masked_logsumexp import masked_logsumexp
from golden_parity import GoldenFile, assert_gradients, assert_near, load_golden
from losses_by_name import SAMPLED_LOSSES


def drawn(seed: int, tokens: int = 7, positives: int = 1, negatives: int = 5):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, positives, generator=g, dtype=torch.float64) * 3,
        torch.randn(tokens, negatives, generator=g, dtype=torch.float64) * 3,
        torch.rand(tokens, positives, generator=g, dtype=torch.float64) + 0.1,
        torch.rand(tokens, negatives, generator=g) < 0.7,
    )


def built(name: str) -> SampledLoss:
    return GBCELoss(num_items=50) if name == "gBCE" else SAMPLED_LOSSES[name]()


def run(loss: SampledLoss, positive, negative, weights, mask):
    if loss.needs_ratings:
        return loss(positive, negative, weights, mask, positive_ratings=torch.full_like(positive, 5.0))
    return loss(positive, negative, weights, mask)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=eps)


def published_scores(golden: GoldenFile, normalise_positives: bool):
    table = golden.parameters["item_emb.weight"].requires_grad_()
    queries = golden.inputs["output_embeddings"].requires_grad_()
    eps, temperature = golden.config["l2_eps"], golden.config["temperature"]
    ids, sampled = golden.inputs["supervision_ids"], golden.inputs["sampled_ids"]
    items = normalised(table[ids], eps) if normalise_positives else table[ids]
    positive = (queries * items).sum(-1, keepdim=True) / temperature
    negative = (queries[:, None] * normalised(table[sampled], eps)).sum(-1) / temperature
    weights = golden.inputs["supervision_weights"][:, None]
    leaves = {"item_emb.weight": table, "output_embeddings": queries}
    return leaves, (positive, negative, weights, sampled != ids[:, None])


@pytest.mark.parametrize(
    ("name", "loss", "normalise_positives"),
    [("meta_sampled_softmax", SampledSoftmaxLoss(), True), ("meta_bce", BCELoss(), False)],
)
def test_hstu_losses_give_the_recorded_numbers(name, loss, normalise_positives):
    golden = load_golden(name)
    leaves, scores = published_scores(golden, normalise_positives)
    value = loss(*scores).mean()
    assert_near(value, golden.outputs["loss"], 1e-5)
    assert_gradients(golden, value, **leaves)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sampled_softmax_is_torch_cross_entropy_over_the_kept_entries(smoothing):
    positive, negative, weights, mask = drawn(0, positives=2)
    output = SampledSoftmaxLoss(label_smoothing=smoothing)(positive, negative, weights, mask)
    expected = 0.0
    for t in range(len(positive)):
        for p in range(positive.shape[1]):
            row = torch.cat([positive[t, p : p + 1], negative[t][mask[t]]])
            expected += weights[t, p] * F.cross_entropy(row, torch.tensor(0), label_smoothing=smoothing)
    assert_near(output.sum, expected, 1e-12)
    assert_near(output.weight, weights.sum(), 1e-12)


def test_bce_of_hstu_means_over_negatives_and_drops_rows_without_any():
    positive, negative, weights, mask = drawn(1)
    mask[2] = False
    output = BCELoss()(positive, negative, weights, mask)
    rows = [t for t in range(len(mask)) if mask[t].any()]
    expected = sum(
        weights[t, 0] * (-F.logsigmoid(positive[t, 0]) - F.logsigmoid(-negative[t][mask[t]]).mean()) / 2 for t in rows
    )
    assert_near(output.sum, expected, 1e-12)
    assert_near(output.weight, weights[rows].sum(), 1e-12)


def test_gbce_calibrates_the_positive():
    positive, negative, weights, mask = drawn(2)
    loss = GBCELoss(num_items=21, calibration=0.75)
    alpha = 5 / 20
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    assert loss.beta(5) == pytest.approx(beta)
    terms = beta * F.logsigmoid(positive[:, 0]) + (F.logsigmoid(-negative) * mask).sum(1)
    expected = -(weights[:, 0] * terms / (1 + mask.sum(1))).sum()
    assert_near(loss(positive, negative, weights, mask).sum, expected, 1e-12)


def test_gbce_without_calibration_is_the_mean_of_binary_terms():
    positive, negative, weights, _ = drawn(3)
    everything = torch.ones_like(negative, dtype=torch.bool)
    plain = BCESampled()(positive, negative, weights, everything).sum / 6
    calibrated = GBCELoss(num_items=50, calibration=0.0)(positive, negative, weights, everything).sum
    assert_near(calibrated, plain, 1e-12)
    assert GBCELoss(num_items=50, calibration=1.0).beta(7) == pytest.approx(7 / 49)


def test_log_in_sums_positives_inside_the_logarithm():
    positive, negative, _, mask = drawn(4, positives=3)
    weights = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64).repeat(7, 1)
    weights[3] = 0
    output = LogInCESampled()(positive, negative, weights, mask)
    inside = (positive.exp() * weights).sum(1)
    terms = -torch.log(inside / (inside + (negative.exp() * mask).sum(1)))
    assert_near(output.sum, terms[[0, 1, 2, 4, 5, 6]].sum(), 1e-12)
    assert output.weight == 6


def test_epsilon_and_clamp_border_act_inside_the_logarithm():
    scores = (
        torch.tensor([[-50.0]]),
        torch.tensor([[0.0]]),
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
    )
    half = float(torch.tensor(2.0).log())
    assert BCESampled()(*scores).sum.item() == pytest.approx(50 + half, rel=1e-6)
    assert BCESampled(epsilon=1e-6)(*scores).sum.item() == pytest.approx(13.8155 + half, rel=1e-4)
    assert BCESampled(clamp_border=20.0)(*scores).sum.item() == pytest.approx(20 + half, rel=1e-6)
    assert LogInCESampled(epsilon=1e-6)(*scores).sum.item() == pytest.approx(13.8155, rel=1e-4)
    assert LogInCESampled(clamp_border=20.0)(*scores).sum.item() == pytest.approx(20, rel=1e-6)


def test_ratings_are_the_labels():
    scores = torch.tensor([[1.5], [-2.0], [0.5]])
    ratings = torch.tensor([[5.0], [2.0], [4.0]])
    weights = torch.tensor([[1.0], [2.0], [0.5]])
    negatives = torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)
    output = BCELossWithRatings()(scores, negatives[0], weights, negatives[1], positive_ratings=ratings)
    target = torch.tensor([[1.0], [0.0], [1.0]])
    expected = (weights * F.binary_cross_entropy_with_logits(scores, target, reduction="none")).sum()
    assert_near(output.sum, expected, 1e-6)
    soft = BCELossWithRatings(threshold=None)(scores, negatives[0], weights, negatives[1], positive_ratings=ratings / 5)
    expected = (weights * F.binary_cross_entropy_with_logits(scores, ratings / 5, reduction="none")).sum()
    assert_near(soft.sum, expected, 1e-6)


def test_ratings_missing_or_out_of_range_are_refused():
    scores = torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(UserError, match="ratings"):
        BCELossWithRatings()(*scores)
    with pytest.raises(UserError, match="threshold"):
        BCELossWithRatings(threshold=None)(*scores, positive_ratings=torch.tensor([[3.0]]))


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_gradients_are_right(name):
    positive, negative, weights, mask = drawn(5, tokens=4, positives=2)
    loss = built(name)
    inputs = positive.requires_grad_(), negative.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, n: run(loss, p, n, weights, mask).sum, inputs)


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_nothing_to_count_gives_zero_and_finite_gradients(name):
    positive, negative, weights, mask = drawn(6)
    positive.requires_grad_()
    output = run(built(name), positive, negative, weights * 0, mask)
    output.sum.backward()
    assert output.sum == 0
    assert output.weight == 0
    assert torch.equal(positive.grad, torch.zeros_like(positive))


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_masked_entries_do_not_change_the_numbers(name):
    positive, negative, weights, mask = drawn(7)
    mask[0] = False
    weights[1] = 0
    dirty_positive, dirty_negative = positive.clone(), negative.masked_fill(~mask, float("nan"))
    dirty_positive[1] = float("nan")
    dirty_positive.requires_grad_(), dirty_negative.requires_grad_()
    output = run(built(name), dirty_positive, dirty_negative, weights, mask)
    assert_near(output.sum, run(built(name), positive, negative, weights, mask).sum, 1e-12)
    output.sum.backward()
    if dirty_negative.grad is not None:
        assert torch.equal(dirty_negative.grad[~mask], torch.zeros_like(dirty_negative.grad[~mask]))


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_nan_scores_that_count_give_a_nan_loss(name):
    positive, negative, weights, mask = drawn(8)
    positive[3] = float("nan")
    assert run(built(name), positive, negative, weights, mask).sum.isnan()
    if name != "BCELossWithRatings":
        positive, negative, weights, mask = drawn(8)
        mask[2, 1], negative[2, 1] = True, float("nan")
        assert run(built(name), positive, negative, weights, mask).sum.isnan()


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_low_precision_scores_are_lifted(name):
    positive, negative, weights, mask = drawn(9)
    low = positive.bfloat16(), negative.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(built(name), *low, weights, mask)
    assert output.sum.dtype == torch.float32
    exact = run(built(name), low[0].double(), low[1].double(), weights, mask)
    assert_near(output.sum.double(), exact.sum, 1e-5)


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_large_scores_stay_finite(name):
    positive, negative, weights, mask = drawn(10)
    output = run(built(name), (positive * 1e4).float(), (negative * 1e4).float(), weights, mask)
    assert output.sum.isfinite()


def test_label_smoothing_must_be_a_share():
    with pytest.raises(UserError, match="label_smoothing"):
        SampledSoftmaxLoss(label_smoothing=1.0)


@pytest.mark.parametrize("loss", [SampledSoftmaxLoss(), BCELoss(), GBCELoss(9)])
@pytest.mark.parametrize(
    "shapes",
    [((3,), (3, 2), (3,), (3, 2)), ((3, 1), (2, 2), (3, 1), (2, 2)), ((3, 1), (3, 2), (3, 2), (3, 2))],
)
def test_shapes_that_do_not_agree(loss: SampledLoss, shapes: tuple[tuple[int, ...], ...]) -> None:
    positive, negative, weights, mask = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="scores, weights and mask must be"):
        loss(positive, negative, weights, mask.bool())


@pytest.mark.parametrize("negatives", [0, 5, 16])
def test_what_a_mask_hides_never_counts(negatives):
    """Widths that are whole words and widths that are not."""
    positive, negative = torch.randn(7, 1), torch.randn(7, negatives, requires_grad=True)
    mask = torch.rand(7, negatives, generator=torch.Generator().manual_seed(0)) < 0.6
    loss = SampledSoftmaxLoss()(positive, negative, torch.ones(7, 1), mask).sum
    kept = torch.cat([positive, negative.masked_fill(~mask, float("-inf"))], dim=1)
    torch.testing.assert_close(loss, (kept.logsumexp(1) - positive[:, 0]).sum())
    (gradient,) = torch.autograd.grad(loss, negative)
    torch.testing.assert_close(gradient, kept.softmax(1)[:, 1:].detach())


@pytest.mark.parametrize("waits", [False, True])
def test_rows_of_true_entries_alone_change_nothing(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """A device that a look would wait for does all rows alike; a CPU those with False entries apart."""
    monkeypatch.setattr(dispatch, "waits", lambda *_: waits)
    scores = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(9, 5) > 0.3
    mask[0], mask[1] = True, False
    out = masked_logsumexp(scores, mask)
    expected = scores.masked_fill(~mask, -torch.inf).logsumexp(1)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.exp().sum(), scores)
    torch.testing.assert_close(gradient, scores.detach().exp() * mask)
