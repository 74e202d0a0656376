"""RePlay's losses: recorded values and gradients, and what each documented argument does."""

from __future__ import annotations

import math
from dataclasses import astuple
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.compat.replay.models.nn.loss import ScalableCrossEntropyLoss, SCEParams
from generative_recommenders.compat.replay.nn.loss import (
    BCE,
    CE,
    BCESampled,
    CESampled,
    CEWeighted,
    LogInCE,
    LogInCESampled,
    LogOutCE,
    LogOutCESampled,
)
from generative_recommenders.compat.replay.nn.sequential import NextItemModel
from generative_recommenders.config.registry import LOSSES
from generative_recommenders.errors import UserError
from generative_recommenders.objectives.losses import catalogue
from generative_recommenders.objectives.losses import sce as scalable_cross_entropy
from golden_parity import GoldenFile, assert_gradients, assert_near, load_golden
from memory import LargestTensor
from replay_scenes import ITEM_WEIGHTS, dot_product, scene, value_of, with_logits

BY_KIND = {
    "bce": lambda v: BCE(),
    "ce": lambda v: CE(),
    "login_ce": LogInCE,
    "logout_ce": LogOutCE,
    "bce_sampled": lambda v: BCESampled(),
    "ce_sampled": lambda v: CESampled(),
    "login_ce_sampled": lambda v: LogInCESampled(),
}
FULL = [f"replay_loss_{kind}" for kind in ("bce", "ce", "login_ce", "logout_ce")]
FULL_MULTI = [f"replay_loss_{kind}_multi" for kind in ("bce", "login_ce", "logout_ce")]
SAMPLED = [
    f"replay_loss_{kind}_sampled{multi}_neg{rank}d"
    for kind in ("bce", "ce", "login_ce")
    for multi in ("", "_multi")
    for rank in (1, 2, 3)
]


def value(loss, golden: GoldenFile, weight, embeddings, mask: str) -> torch.Tensor:
    loss.logits_callback = dot_product(weight)
    names = ("positive_labels", "negative_labels")
    labels = {name: golden.inputs[name] for name in names if name in golden.inputs}
    return loss(model_embeddings=embeddings, target_padding_mask=golden.inputs[mask], **labels)


@pytest.mark.parametrize("case", FULL + FULL_MULTI + SAMPLED)
def test_recorded_numbers(case):
    golden = load_golden(case)
    weight = golden.parameters["item_weight"].requires_grad_()
    embeddings = golden.inputs["model_embeddings"].requires_grad_()
    kind = golden.config["kind"]
    tolerance = 3e-5 if kind == "bce_sampled" else 1e-5
    loss = BY_KIND[kind](len(weight))
    if "partial_loss" in golden.outputs:
        recorded = BCE(masked_labels="targets") if kind == "bce" else loss
        partial = value(recorded, golden, weight, embeddings, "partial_target_padding_mask")
        assert_near(partial, golden.outputs["partial_loss"], tolerance)
    whole = value(loss, golden, weight, embeddings, "target_padding_mask")
    assert_near(whole, golden.outputs["loss"], tolerance)
    assert_gradients(golden, whole, item_weight=weight, model_embeddings=embeddings)


def test_recorded_sce_draws_from_the_global_generator():
    golden = load_golden("replay_sce")
    config, inputs = golden.config, golden.inputs
    weight, embeddings = golden.parameters["item_weight"], inputs["model_embeddings"]
    for mix_x, tokens_mask in ((False, None), (True, None), (False, inputs["tokens_mask"])):
        params = SCEParams(config["n_buckets"], config["bucket_size_x"], config["bucket_size_y"], mix_x)
        rectangle = embeddings, inputs["positive_labels"], weight, inputs["padding_mask"]
        torch.manual_seed(config["torch_seed"])
        actual = ScalableCrossEntropyLoss(params)(*rectangle, tokens_mask)
        torch.manual_seed(config["torch_seed"])
        shape = (config["B"] * config["L"], config["n_buckets"]) if mix_x else (config["n_buckets"], config["D"])
        normals = torch.randn(shape)
        counted = inputs["padding_mask"] if tokens_mask is None else inputs["padding_mask"] & ~tokens_mask
        expected = scalable_cross_entropy.ScalableCrossEntropyLoss(*astuple(params))(
            embeddings.flatten(0, 1),
            weight,
            inputs["positive_labels"].flatten(),
            counted.flatten(),
            selectable=inputs["padding_mask"].flatten(),
            normals=normals,
        )
        assert_near(actual, expected.mean(), 1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LogInCE(9), catalogue.LogInCE(1e-6, 100.0)),
        (LogInCE(9, log_epsilon=0.1, clamp_border=1.5), catalogue.LogInCE(0.1, 1.5)),
        (LogOutCE(9), catalogue.LogOutCE()),
        (CE(), catalogue.CE()),
        (BCE(masked_labels="targets"), catalogue.BCE()),
    ],
)
def test_a_loss_is_the_one_of_training(theirs, ours):
    """By RePlay's name, from logits of a callback; by gin's, in blocks of the catalogue: one class computes both."""
    weight, hidden, labels, mask = scene(positives=1 if isinstance(theirs, CE) else 2)
    mask[1, 0, 1:] = False
    expected = ours(hidden.flatten(0, 1), weight, labels.flatten(0, 1), mask.flatten(0, 1)).mean()
    assert_near(with_logits(theirs, weight)(hidden, labels, mask), expected, 1e-6)


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (CE(), "CE"),
        (CEWeighted("importance"), "CEWeighted"),
        (BCE(), "BCE"),
        (LogInCE(9), "LogInCE"),
        (LogOutCE(9), "LogOutCE"),
        (CESampled(), "CESampled"),
        (LogOutCESampled(), "LogOutCESampled"),
        (BCESampled(), "BCESampled"),
        (LogInCESampled(), "LogInCESampled"),
    ],
)
def test_a_loss_computes_by_the_class_that_gin_names(theirs, name):
    assert type(theirs.core) is LOSSES[name].make


@pytest.mark.parametrize("name", ["ignore_index", "padding_idx"])
@pytest.mark.parametrize("loss", [BCE, CE, BCESampled, CESampled, LogInCESampled])
def test_labels_named_as_padding_never_count(loss, name):
    weight, hidden, labels, mask = scene()
    padded = labels.masked_fill(~mask, 9)
    actual = value_of(loss(**{name: 9}), weight, hidden, padded, torch.ones_like(mask))
    assert_near(actual, value_of(loss(), weight, hidden, labels, mask), 1e-6)


@pytest.mark.parametrize("loss", [BCE, BCESampled, CESampled, LogInCESampled])
def test_an_ignored_label_beside_others_is_no_label(loss):
    weight, hidden, labels, mask = scene()
    labels = labels.clamp(min=1)
    beside = torch.cat([labels, torch.zeros_like(labels)], -1)
    actual = value_of(loss(padding_idx=0), weight, hidden, beside, mask.repeat(1, 1, 2))
    assert_near(actual, value_of(loss(), weight, hidden, labels, mask), 1e-6)


def test_bce_ignores_masked_labels_beside_others():
    weight, hidden, labels, mask = scene(positives=2)
    mask[:, :, 1] = False
    actual = with_logits(BCE(), weight)(hidden, labels, mask)
    assert_near(actual, with_logits(BCE(), weight)(hidden, labels[..., :1], mask[..., :1]), 1e-6)
    other = with_logits(BCE(masked_labels="targets"), weight)(hidden, labels, mask)
    assert (actual - other).abs() > 0.01
    with pytest.raises(UserError, match="masked_labels"):
        BCE(masked_labels="targets?")


def test_weighted_ce_weighs_samples():
    weight, hidden, labels, mask = scene()
    sample_weights = torch.rand(2, 3)
    loss = with_logits(CEWeighted(feature_name="importance"), weight)
    actual = loss(hidden, labels, mask, feature_tensors={"importance": sample_weights})
    rows = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    assert_near(actual, (rows * sample_weights.flatten())[mask.flatten()].mean(), 1e-6)
    with pytest.raises(UserError, match="importance"):
        loss(hidden, labels, mask)
    with pytest.raises(UserError, match=r"'importance' \(2,\): give a weight for each position, \(2, 3\)"):
        loss(hidden, labels, mask, feature_tensors={"importance": torch.ones(2)})


@pytest.mark.parametrize("loss", [LogInCE, LogOutCE])
def test_cardinality_leaves_the_padding_row_out(loss):
    weight, hidden, labels, mask = scene()
    with_padding = torch.cat([weight, torch.full((1, 4), 5.0)])
    actual = with_logits(loss(cardinality=9), with_padding)(hidden, labels, mask)
    assert_near(actual, with_logits(loss(cardinality=9), weight)(hidden, labels, mask), 1e-6)


@pytest.mark.parametrize("loss", [LogInCE, LogOutCE])
def test_the_ignored_negative_is_left_out_of_the_catalogue(loss):
    weight, hidden, labels, mask = scene()
    labels = labels.masked_fill(labels == 8, 0)
    actual = with_logits(loss(cardinality=9, negative_labels_ignore_index=8), weight)(hidden, labels, mask)
    assert_near(actual, with_logits(loss(cardinality=8), weight[:8])(hidden, labels, mask), 1e-6)


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled])
def test_ignored_negatives_do_not_count(loss):
    given = scene()
    actual = value_of(loss(negative_labels_ignore_index=-7), *given, negatives=(0, -7, 4, -7))
    assert_near(actual, value_of(loss(), *given), 1e-6)


@pytest.mark.parametrize("loss", [BCESampled, LogInCESampled])
def test_log_epsilon_and_clamp_border_act(loss):
    weight, hidden = torch.tensor([[-1.0], [1.0]]), torch.full((1, 1, 1), 60.0)
    labels, mask = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool)
    negatives = torch.tensor([1])

    def result(**options) -> float:
        return with_logits(loss(**options), weight)(hidden, labels, negatives, mask).item()

    assert (loss().log_epsilon, loss().clamp_border) == (1e-6, 100.0)
    terms = 2 if loss is BCESampled else 1
    assert result(log_epsilon=1e-3) == pytest.approx(-terms * math.log(1e-3), rel=1e-4)
    assert result(log_epsilon=0.0, clamp_border=50.0) == pytest.approx(terms * 50)


def test_the_callers_mask_keeps_its_shape():
    weight, hidden, labels, mask = scene()
    with_logits(BCE(), weight)(hidden, labels, mask)
    assert mask.shape == (2, 3, 1)


def test_bad_input_is_refused():
    weight, hidden, labels, mask = scene()
    with pytest.raises(UserError, match="logits_callback"):
        CE()(hidden, labels, mask)
    with pytest.raises(UserError, match="masked"):
        with_logits(CE(), weight)(hidden, labels, torch.zeros_like(mask))
    with pytest.raises(UserError, match="outside"):
        with_logits(CE(), weight)(hidden, labels + 9, mask)
    with pytest.raises(UserError, match="one positive"):
        with_logits(CE(), weight)(hidden, labels.repeat(1, 1, 2), mask.repeat(1, 1, 2))
    for wrong, words in (
        (mask[..., 0], r"is \(2, 3\) bool for positive_labels \(2, 3, 1\): give both as \[B, L, P\]"),
        (mask[:1], r"is \(1, 3, 1\) bool"),
        (mask.long(), r"is \(2, 3, 1\) int64"),
        (None, "is missing: give a bool mask"),
    ):
        for loss in (CE(), CESampled()):
            with pytest.raises(UserError, match=f"^{type(loss).__name__}: target_padding_mask {words}"):
                value_of(loss, weight, hidden, labels, wrong)
    with pytest.raises(UserError, match=r"target_padding_mask is \(2, 3\) bool for positive_labels \(2, 3\)"):
        with_logits(LogInCE(9), weight)(hidden, labels[..., 0], mask[..., 0])
    with pytest.raises(UserError, match="CESampled: negative_labels are missing"):
        with_logits(CESampled(), weight)(hidden, labels, None, mask)
    with pytest.raises(UserError, match="negative labels"):
        with_logits(CESampled(), weight)(hidden, labels, torch.zeros(5, 2, dtype=torch.int64), mask)
    with pytest.raises(UserError, match="reduction"):
        CE(reduction="median")


class Table(NextItemModel):
    """Item embeddings without a body."""

    def __init__(self, weight: torch.Tensor, loss) -> None:
        super().__init__(torch.nn.Identity(), loss)
        self.weight = torch.nn.Parameter(weight)

    def item_embeddings(self, candidates_to_score: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight if candidates_to_score is None else self.weight[candidates_to_score]


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled])
@pytest.mark.parametrize("of_a_model", [True, False])
def test_negatives_of_a_row_are_one_product(loss, of_a_model):
    g = torch.Generator().manual_seed(5)
    rows, width, dim, count = 3, 20, 8, 16
    weight = torch.randn(30, dim, generator=g)
    hidden = torch.randn(rows, width, dim, generator=g).requires_grad_()
    labels = torch.randint(0, 30, (rows, width, 1), generator=g)
    mask = torch.rand(rows, width, 1, generator=g) < 0.7
    mask[1] = False
    negatives = torch.randint(0, 30, (rows, count), generator=g)
    negatives[0, 3] = -100
    scored = loss()
    scored.logits_callback = Table(weight, scored).get_logits if of_a_model else dot_product(weight)
    with LargestTensor() as largest:
        by_row = scored(hidden, labels, negatives, mask)
        by_row.backward()
    assert largest.numel <= rows * width * count
    gradient, hidden.grad = hidden.grad, None
    by_position = scored(hidden, labels, negatives[:, None].expand(-1, width, -1), mask)
    by_position.backward()
    assert_near(by_row, by_position.detach(), 1e-6)
    assert_near(gradient, hidden.grad, 1e-6)


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled])
def test_shared_negatives_are_checked_as_they_were_given(loss):
    """Nothing takes more bytes than the logits, as the ids of all negatives at all positions would."""
    g = torch.Generator().manual_seed(5)
    weight, hidden = torch.randn(300, 8, generator=g), torch.randn(4, 10, 8, generator=g)
    labels, negatives = torch.randint(0, 300, (4, 10, 1), generator=g), torch.arange(200)
    with LargestTensor() as largest:
        with_logits(loss(), weight)(hidden, labels, negatives, torch.ones(4, 10, 1, dtype=torch.bool))
    assert largest.nbytes <= 4 * 40 * 200


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled])
def test_ids_outside_of_the_catalogue_are_refused(loss):
    weight, hidden, labels, mask = scene()
    scored, negatives = with_logits(loss(), weight), torch.tensor([0, 4])
    for wrong in (-1, 9):
        with pytest.raises(UserError, match="label"):
            scored(hidden, labels.index_fill(1, torch.tensor(1), wrong), negatives, mask)
        for shape in ((2,), (2, 2), (2, 3, 2)):
            with pytest.raises(UserError, match="negative"):
                scored(hidden, labels, torch.full(shape, wrong), mask)
    hidden_away = labels.masked_fill(~mask, -1)
    assert scored(hidden, hidden_away, negatives, mask) == scored(hidden, labels, negatives, mask)
    of_positions = negatives.expand(2, 3, -1).masked_fill(~mask, -1)
    assert_near(scored(hidden, labels, of_positions, mask), scored(hidden, labels, negatives, mask), 1e-6)


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled, partial(CESampled, weight=ITEM_WEIGHTS)])
def test_a_masked_label_may_be_anything(loss):
    weight, hidden, labels, mask = scene(positives=2)
    mask[:, :, 1] = False
    scored, negatives = with_logits(loss(), weight), torch.tensor([0, 4])
    expected = scored(hidden, labels[:, :, :1], negatives, mask[:, :, :1])
    for anything in (-1, 50):
        labels[:, :, 1] = anything
        assert scored(hidden, labels, negatives, mask) == expected


@pytest.mark.parametrize("loss", [BCESampled, CESampled, LogInCESampled])
def test_no_negative_left_gives_finite_gradients(loss):
    weight, hidden, labels, mask = scene()
    hidden.requires_grad_()
    with_logits(loss(), weight)(hidden, labels, labels, mask).backward()
    assert torch.isfinite(hidden.grad).all()


def test_sce_is_a_module_and_refuses_to_learn_from_nothing():
    loss = ScalableCrossEntropyLoss(SCEParams(2, 3, 4))
    assert isinstance(loss, torch.nn.Module)
    weight, hidden, labels, mask = scene()
    rectangle = hidden, labels[..., 0], weight
    with pytest.raises(UserError, match="masked"):
        loss(*rectangle, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="masked"):
        loss(*rectangle, mask[..., 0], mask[..., 0])
    with pytest.raises(UserError, match="masked"):
        loss(hidden[:0], labels[:0, :, 0], weight, mask[:0, :, 0])
    with pytest.raises(UserError, match="positives"):
        loss(hidden, labels[..., 0] + 9, weight, mask[..., 0])


def test_sce_whose_buckets_miss_what_counts_is_zero():
    weight, hidden, labels, _ = scene()
    real = torch.ones(2, 3, dtype=torch.bool)
    losses = []
    for place in range(6):
        ignored = (torch.arange(6) != place).view(2, 3)
        torch.manual_seed(0)
        losses.append(ScalableCrossEntropyLoss(SCEParams(1, 1, 4))(hidden, labels[..., 0], weight, real, ignored))
    assert sorted(loss == 0 for loss in losses) == [False] + [True] * 5


@pytest.mark.parametrize("loss", [BCE, CE, BCESampled, CESampled, LogInCESampled])
def test_nan_logits_give_a_nan_loss(loss):
    weight, hidden, labels, mask = scene()
    assert value_of(loss(), weight, hidden * float("nan"), labels, mask).isnan()
