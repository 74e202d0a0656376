"""The arguments of RePlay's losses: defaults, what they do together, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.compat.replay.nn.loss import (
    BCE,
    CE,
    BCESampled,
    CESampled,
    CEWeighted,
    LogInCE,
    LogInCESampled,
    LogOutCE,
)
from generative_recommenders.errors import UserError
from golden_parity import assert_near
from replay_scenes import ITEM_WEIGHTS, scene, with_logits


def test_ce_sampled_takes_label_smoothing_and_reduction():
    weight, hidden, labels, mask = scene()
    negatives = torch.tensor([100, 101]) % 9
    labels = labels.masked_fill((labels == negatives[0]) | (labels == negatives[1]), 5)
    logits = torch.cat([(hidden * weight[labels[..., 0]]).sum(-1, keepdim=True), hidden @ weight[negatives].t()], -1)
    for options in ({"label_smoothing": 0.1}, {"reduction": "sum"}):
        expected = F.cross_entropy(logits[mask[:, :, 0]], torch.zeros(5, dtype=torch.int64), **options)
        actual = with_logits(CESampled(**options), weight)(hidden, labels, negatives, mask)
        assert_near(actual, expected, 1e-6)


CROSS_ENTROPY_ARGUMENTS = [
    {**weight, **smoothing, "reduction": reduction}
    for weight in ({}, {"weight": ITEM_WEIGHTS})
    for smoothing in ({}, {"label_smoothing": 0.2}, {"label_smoothing": 1.0})
    for reduction in ("mean", "sum", "none")
]


def placed(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What torch gives for the targets that count, at their places in the rectangle; a scalar as it is."""
    return rows if rows.dim() == 0 else torch.zeros(mask.shape).masked_scatter(mask, rows)


@pytest.mark.parametrize("options", CROSS_ENTROPY_ARGUMENTS)
def test_cross_entropy_arguments_act_together(options):
    weight, hidden, labels, mask = scene()
    logits, flat = (hidden @ weight.t())[mask[:, :, 0]], labels[mask]
    expected = placed(F.cross_entropy(logits, flat, **options), mask)
    assert_near(with_logits(CE(**options), weight)(hidden, labels, mask), expected, 1e-6)
    # With one positive, every other item of the catalogue is a negative: the same softmax.
    assert_near(with_logits(LogOutCE(9, **options), weight)(hidden, labels, mask), expected, 1e-5)
    everything = torch.arange(9)
    assert_near(with_logits(CESampled(**options), weight)(hidden, labels, everything, mask), expected, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [{}, {"weight": ITEM_WEIGHTS}, {"pos_weight": ITEM_WEIGHTS.flip(0)}])
def test_bce_takes_item_weights_and_reduction(weights, reduction):
    weight, hidden, labels, mask = scene(positives=2)
    options = {**weights, "weight": ITEM_WEIGHTS}
    logits = hidden @ weight.t()
    target = torch.zeros_like(logits).scatter_(2, labels, 1.0)
    rows = F.binary_cross_entropy_with_logits(logits, target, reduction="none", **options).sum(2)
    counts = mask.any(2)
    expected = {"mean": rows[counts].mean(), "sum": rows[counts].sum(), "none": rows * counts}[reduction]
    actual = with_logits(BCE(reduction=reduction, **options), weight)(hidden, labels, mask)
    assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize(
    "build",
    [
        *(lambda r, c=c: c(reduction=r) for c in (BCE, BCESampled, CESampled, LogInCESampled)),
        *(lambda r, c=c: c(9, reduction=r) for c in (LogInCE, LogOutCE)),
        lambda r: CEWeighted("importance", reduction=r, weight=ITEM_WEIGHTS),
    ],
)
def test_the_unreduced_loss_adds_up(build):
    weight, hidden, labels, mask = scene(positives=1)
    arguments = {"target_padding_mask": mask}
    if isinstance(build("sum"), BCESampled | CESampled | LogInCESampled):
        arguments["negative_labels"] = torch.tensor([0, 4])
    if isinstance(build("sum"), CEWeighted):
        arguments["feature_tensors"] = {"importance": torch.rand(2, 3)}
    terms, total, mean = (with_logits(build(r), weight)(hidden, labels, **arguments) for r in ("none", "sum", "mean"))
    assert terms.shape[:2] == mask.shape[:2]
    assert (terms.reshape(2, 3)[~mask[:, :, 0]] == 0).all() and (terms.reshape(2, 3)[mask[:, :, 0]] != 0).all()
    assert_near(terms.sum(), total, 1e-5)
    assert_near(total / 5, mean, 1e-5)


@pytest.mark.parametrize("name", ["size_average", "no_such", "weight", "pos_weight", "label_smoothing"])
@pytest.mark.parametrize(
    ("loss", "takes"),
    [
        (BCE, ("weight", "pos_weight")),
        (CE, ("weight", "label_smoothing")),
        (CESampled, ("weight", "label_smoothing")),
        (lambda **kwargs: LogOutCE(9, **kwargs), ("weight", "label_smoothing")),
        (lambda **kwargs: CEWeighted("importance", **kwargs), ("weight", "label_smoothing")),
        (lambda **kwargs: LogInCE(9, **kwargs), ()),
        (BCESampled, ()),
        (LogInCESampled, ()),
    ],
)
def test_arguments_without_a_meaning_are_refused_by_name(loss, takes, name):
    value = 0.1 if name == "label_smoothing" else ITEM_WEIGHTS
    if name in takes:
        loss(**{name: value})
        return
    with pytest.raises(UserError, match=f"(CE|BCE).*: the argument '{name}' means nothing here"):
        loss(**{name: value})


def test_bce_refuses_an_item_that_is_no_negative():
    with pytest.raises(UserError, match="BCE: every item counts: 'negative_labels_ignore_index' means nothing"):
        BCE(negative_labels_ignore_index=3)


@pytest.mark.parametrize("value", [-0.1, 1.1, None, "0.1"])
def test_label_smoothing_that_is_no_share_is_refused(value):
    with pytest.raises(UserError, match="CESampled: label_smoothing"):
        CESampled(label_smoothing=value)


def test_item_weights_of_another_catalogue_are_refused():
    weight, hidden, labels, mask = scene()
    for loss in (CE(weight=torch.ones(4)), BCE(pos_weight=torch.ones(4)), LogOutCE(9, weight=torch.ones(4))):
        with pytest.raises(UserError, match="weight has 4 numbers for 9 items"):
            with_logits(loss, weight)(hidden, labels, mask)
    with pytest.raises(UserError, match="CE: weight must be a tensor"):
        CE(weight=[1.0, 2.0])
    with pytest.raises(UserError, match="CESampled: a .* weight has 1 numbers"):
        with_logits(CESampled(weight=torch.ones(1)), weight)(hidden, labels, torch.tensor([0, 4]), mask)
