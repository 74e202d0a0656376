"""genrec's losses: their documented formulas, and the arguments that used to do nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from generative_recommenders.compat.genrec.losses import ContrastiveLoss, SequenceLoss, VQVAELoss
from generative_recommenders.errors import UserError


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_vqvae_weighs_its_terms():
    x = torch.zeros(3, 2)
    losses = VQVAELoss(commitment_cost=0.5, beta=2.0)(x, x + 2, torch.tensor(3.0), torch.tensor(5.0))
    assert losses["reconstruction_loss"] == 4
    assert losses["total_loss"] == 4 + 1.5 + 10
    assert (losses["commitment_loss"], losses["embedding_loss"]) == (3, 5)
    assert VQVAELoss()(x, x, torch.tensor(4.0), torch.tensor(1.0))["total_loss"] == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sequence_loss_counts_only_attended_labels(smoothing):
    g = generator()
    logits = torch.randn(3, 4, 6, generator=g).requires_grad_()
    labels = torch.randint(0, 6, (3, 4), generator=g)
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    labels[2, 0] = -100
    counts = (attention_mask == 1) & (labels != -100)
    losses = SequenceLoss(6, label_smoothing=smoothing)(logits, labels, attention_mask)
    expected = F.cross_entropy(logits[counts], labels[counts], label_smoothing=smoothing)
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["accuracy"], (logits.argmax(-1) == labels)[counts].float().mean())
    losses["loss"].backward()
    assert torch.equal(logits.grad[~counts], torch.zeros_like(logits.grad[~counts]))


def test_sequence_loss_refuses_a_batch_without_targets():
    with pytest.raises(UserError, match="no position"):
        SequenceLoss(4)(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))


@pytest.mark.parametrize("label", [-1, 4])
def test_sequence_loss_refuses_labels_out_of_range_as_cross_entropy_does(label):
    with pytest.raises(UserError, match=f"SequenceLoss: labels .* {label}"):
        SequenceLoss(4)(torch.zeros(1, 2, 4), torch.tensor([[1, label]]))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 9}, {"label_smoothing": 0.3}])
def test_sequence_loss_is_the_documented_code(options, mask):
    logits, labels = torch.randn(3, 4, 6, generator=generator()), torch.arange(12).view(3, 4) % 6
    labels[0, 1] = options.get("ignore_index", -100)
    losses = SequenceLoss(6, **options)(logits, labels, torch.ones_like(labels) if mask else None)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits.view(-1, 6), labels.view(-1), **options))
    correct = (logits.argmax(-1) == labels).sum() / 11
    torch.testing.assert_close(losses["accuracy"], correct)


def documented_contrastive(anchor, positive, negative, temperature, margin=0.0):
    close = F.cosine_similarity(anchor, positive)[:, None] - margin
    far = F.cosine_similarity(anchor[:, None], negative, dim=-1)
    target = torch.zeros(len(anchor), dtype=torch.int64)
    return F.cross_entropy(torch.cat([close, far], 1) / temperature, target)


def triples():
    g = generator()
    return (torch.randn(*shape, generator=g) for shape in ((5, 8), (5, 8), (5, 3, 8)))


def test_contrastive_loss_is_the_documented_code():
    anchor, positive, negative = triples()
    expected = documented_contrastive(anchor, positive, negative, 0.1)
    torch.testing.assert_close(ContrastiveLoss()(anchor, positive, negative), expected)
    torch.testing.assert_close(ContrastiveLoss(margin=0.7)(anchor, positive, negative), expected)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_contrastive_loss_asks_for_the_margin_where_told_to(margin):
    anchor, positive, negative = triples()
    expected = documented_contrastive(anchor, positive, negative, 0.5, margin)
    actual = ContrastiveLoss(0.5, margin, apply_margin=True)(anchor, positive, negative)
    torch.testing.assert_close(actual, expected)


def test_empty_batches_are_refused():
    with pytest.raises(UserError, match="no position"):
        SequenceLoss(4)(torch.zeros(0, 2, 4), torch.zeros(0, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="no anchors"):
        ContrastiveLoss()(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0, 3, 8))
    with pytest.raises(UserError, match="empty"):
        VQVAELoss()(torch.zeros(0, 8), torch.zeros(0, 8), torch.tensor(0.0), torch.tensor(0.0))
