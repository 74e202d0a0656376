"""RePlay's aggregators of feature embeddings against golden numbers, and refused widths."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.agg import (
    ConcatAggregator,
    PositionAwareAggregator,
    SumAggregator,
)
from generative_recommenders.errors import UserError
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters


def test_position_aware_parity() -> None:
    golden = load_golden("replay_position_aware_aggregator")
    c = golden.config
    module = PositionAwareAggregator(SumAggregator(c["D"]), c["max_len"], 0.0)
    load_parameters(module, golden.parameters)
    features = {name: golden.inputs[name].requires_grad_() for name in ("a", "b")}
    out = module(features)
    assert_near(out, golden.outputs["out"])
    assert_gradients(golden, out, module=module, **features)
    short = golden.outputs["short"].shape[1]
    assert_near(module({k: v[:, -short:] for k, v in features.items()}), golden.outputs["short"])


def test_sum_and_concat_parity() -> None:
    golden = load_golden("replay_sum_concat_aggregators")
    c, inputs = golden.config, golden.inputs
    features = {name: inputs[name].requires_grad_() for name in ("zeta", "alpha", "mid")}
    concat = ConcatAggregator(c["dims"], c["D"])
    load_parameters(concat, golden.parameters)
    out = concat(features)
    assert_near(out, golden.outputs["concat"])
    assert_gradients(golden, out, module=concat, **features)
    sums = {"sum_a": inputs["sum_a"], "sum_b": inputs["sum_b"]}
    assert_near(SumAggregator(c["D"])(sums), golden.outputs["sum"])
    single = ConcatAggregator([c["D"]], c["D"])
    assert_near(single({"sum_a": inputs["sum_a"]}), golden.outputs["concat_single"])
    assert list(single.parameters()) == []


def test_concat_ignores_the_order_of_the_mapping() -> None:
    module = ConcatAggregator([2, 3], 4)
    a, b = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(module({"a": a, "b": b}), module({"b": b, "a": a}))
    assert module.embedding_dim == 4


def test_position_aware_takes_any_aggregator() -> None:
    module = PositionAwareAggregator(ConcatAggregator([2, 3], 4), 6, 0.5).eval()
    assert module.embedding_dim == 4
    features = {"a": torch.zeros(1, 6, 2), "b": torch.zeros(1, 6, 3)}
    bias = module.embedding_aggregator.feat_projection.bias
    assert torch.allclose(module(features)[0], 2.0 * bias + module.pe.weight, atol=1e-6)


def test_bad_widths_and_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="embedding b has width 3"):
        SumAggregator(2)({"a": torch.zeros(1, 2), "b": torch.zeros(1, 3)})
    with pytest.raises(UserError, match="width 3"):
        ConcatAggregator([3], 4)
    with pytest.raises(UserError, match="max_sequence_length 2"):
        PositionAwareAggregator(SumAggregator(2), 2, 0.0)({"a": torch.zeros(1, 3, 2)})
