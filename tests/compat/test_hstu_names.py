"""Names and signatures of the HSTU authors' program that its notes document."""

from __future__ import annotations

import inspect

import pytest
import torch

from generative_recommenders.build.parts import build_model
from generative_recommenders.compat.meta.modules import GeneralizedInteractionModule, truncated_normal
from generative_recommenders.modeling.model import SequenceRecommender
from tiny_models import LENGTHS, catalogue, histories, settings


def test_a_model_has_the_documented_arguments() -> None:
    """Past payloads are called past events here."""
    arguments = ["past_lengths", "past_ids", "past_embeddings", "past_events", "batch_id"]
    signature = inspect.signature(SequenceRecommender.forward).parameters
    assert list(signature)[1:] == arguments and signature["batch_id"].default is None
    assert list(inspect.signature(SequenceRecommender.get_item_embeddings).parameters)[1:] == ["item_ids"]


def test_truncated_normal_fills_within_two_deviations() -> None:
    torch.manual_seed(0)
    x = torch.empty(200, 50)
    assert truncated_normal(x, mean=1.0, std=0.5) is x
    assert float(x.min()) >= 0.0 and float(x.max()) <= 2.0
    assert float(x.mean()) == pytest.approx(1.0, abs=0.02) and float(x.std()) == pytest.approx(0.44, abs=0.02)
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert truncated_normal(x, mean=1.5, std=0.0).eq(1.5).all()
    assert truncated_normal(parameter, 5.0, 0.1).requires_grad and float(parameter.detach().min()) > 4.0


def test_a_model_takes_a_batch_id_and_has_an_interaction_module() -> None:
    model = build_model(settings(), catalogue()).eval()
    ids, _ = histories()
    assert isinstance(model.similarity, GeneralizedInteractionModule)
    assert torch.equal(model(LENGTHS, ids), model(LENGTHS, ids, batch_id=3))
