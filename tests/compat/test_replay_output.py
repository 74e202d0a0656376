"""Outputs of RePlay's models: mappings whose keys are attributes."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch

from generative_recommenders.compat.replay.nn.output import InferenceOutput, TrainOutput


def test_outputs_are_mappings_with_attributes() -> None:
    states = (torch.zeros(2, 3, 4),)
    train, inference = TrainOutput(torch.tensor(1.5), states), InferenceOutput(logits=torch.ones(2, 5))
    assert train["loss"] is train.loss and dict(train).keys() == {"loss", "hidden_states"}
    assert train["hidden_states"] is states and inference["logits"].shape == (2, 5)
    assert inference.hidden_states is None
    with pytest.raises(AttributeError, match="TrainOutput has no 'logits'"):
        _ = train.logits


def test_outputs_are_copied_and_rebuilt_from_a_mapping() -> None:
    """As Lightning and DDP do where they move them to a device."""
    output = InferenceOutput(torch.ones(2, 5))
    rebuilt = InferenceOutput(OrderedDict(output))
    assert rebuilt.logits is output.logits and rebuilt.keys() == output.keys()
    assert torch.equal(copy.deepcopy(output).logits, output.logits)
