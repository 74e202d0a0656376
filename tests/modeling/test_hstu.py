"""HSTU: parity with the authors' numbers in four settings, the time bias, causality, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from generative_recommenders.build.parts import build_model
from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.events import next_times
from generative_recommenders.ops.attention.relative_bias import BiasInputs, bias_inputs
from generative_recommenders.ops.layout import jagged_layout, padded_layout
from golden_encoders import ENTRANCES, assert_parity, choose_backend, recommender_of
from golden_parity import assert_near, load_golden
from tiny_models import catalogue, settings

CASES = ["meta_hstu", "meta_hstu_concat_ua", "meta_hstu_no_bias", "meta_hstu_softmax_no_bias"]
SMALL = {"num_heads": 2, "dqk": 3, "dv": 5}


def encoder_of(config: dict) -> HSTU:
    return HSTU(
        config["embedding_dim"],
        config["max_sequence_len"] + config["max_output_len"],
        config["num_blocks"],
        config["num_heads"],
        config["dqk"],
        config["dv"],
        config["normalization"],
        concat_ua=config["concat_ua"],
        enable_relative_attention_bias=config["relative_attention_bias"],
    )


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("case", CASES)
def test_parity(monkeypatch: pytest.MonkeyPatch, case: str, entrance: str, backend: str) -> None:
    choose_backend(monkeypatch, backend)
    golden = load_golden(case)
    assert_parity(recommender_of(golden, encoder_of(golden.config)), golden, entrance)


@pytest.mark.parametrize("case", ["meta_hstu", "meta_hstu_concat_ua"])
def test_parity_of_the_bias(case: str) -> None:
    golden = load_golden(case)
    model = recommender_of(golden, encoder_of(golden.config))
    lengths, times = golden.inputs["past_lengths"].long(), golden.inputs["timestamps"]
    layout, width = padded_layout(lengths, times.shape[1]), times.shape[1]
    queries = next_times(times, lengths, None).flatten()
    (inputs,) = bias_inputs(layout, width, (queries, times.flatten()), whole=True)
    for index, block in enumerate(model.sequence.encoder.blocks):
        assert_near(block.bias(inputs)[:, 0], golden.outputs[f"bias_layer{index}"])


def small_input(lengths: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator, count = torch.Generator().manual_seed(1), sum(lengths)
    times = torch.randint(1, 10**6, (count,), generator=generator)
    events = {"timestamps": times, "next_timestamps": times + 500}
    return torch.randn(count, 8, generator=generator), events


def test_causal_with_the_next_time_held_fixed() -> None:
    encoder, layout = HSTU(8, 9, **SMALL).eval(), jagged_layout(torch.tensor([7]), 9)
    x, events = small_input([7])
    changed, times = x.clone(), {name: values.clone() for name, values in events.items()}
    changed[4:] += 1
    times["timestamps"][4:] += 1000
    times["next_timestamps"][4:] += 1000
    outputs = encoder(x, layout, events), encoder(changed, layout, times)
    torch.testing.assert_close(outputs[0][:4], outputs[1][:4])
    assert (outputs[0][4:] != outputs[1][4:]).all(0).any()


def test_a_part_of_the_projection_copies_no_weights() -> None:
    block, x = HSTU(8, 6, **SMALL).blocks[0], torch.randn(3, 8)
    with torch.profiler.profile() as profile:
        k, v = block.project(x, "kv")
    assert not {event.key for event in profile.key_averages()} & {"aten::cat", "aten::copy_"}
    _, whole_v, _, whole_k = block.project(x)
    torch.testing.assert_close((k, v), (whole_k, whole_v))


def test_attention_divides_by_the_tokens_attended_to() -> None:
    """One block whose layer norm hides no scale: with one head of equal values the output is the mean of SiLU
    weights."""
    causal = jagged_layout(torch.tensor([4, 0, 3]), 6)
    constant, own = (HSTU(8, 6, 1, **SMALL, attn_divisor=each).eval() for each in ("max_length", "length"))
    own.load_state_dict(constant.state_dict())
    x, events = small_input([4, 0, 3])
    inputs = bias_inputs(causal, 6, (events["next_timestamps"], events["timestamps"]))
    block = own.blocks[0]
    u, v, q, k = block.project(x)
    by_hand = block.attention(q, k, v, causal, inputs) * 6 / torch.tensor([1, 2, 3, 4, 1, 2, 3])[:, None, None]
    torch.testing.assert_close(own(x, causal, events), block.combine(x, u, by_hand))
    assert not torch.allclose(own(x, causal, events), constant(x, causal, events))


@pytest.mark.parametrize("left_out", ["time", "position"])
def test_the_bias_by_time_or_by_position_alone(left_out: str) -> None:
    encoder = HSTU(8, 9, 1, **SMALL, **{f"enable_relative_{left_out}_bias": False})
    x, events = small_input([7])
    later = {name: values * 3 for name, values in events.items()}
    layout = jagged_layout(torch.tensor([7]), 9)
    assert torch.equal(encoder(x, layout, events), encoder(x, layout, later)) == (left_out == "time")
    encoder(x, layout, events).sum().backward()
    assert all((p.grad is None) == (left_out == "time" and "time" in n) for n, p in encoder.named_parameters())
    inputs = BiasInputs(torch.arange(9).view(3, 3), torch.zeros(1, 3, 3, dtype=torch.int64))
    assert (encoder.blocks[0].bias(inputs).unique().numel() == 1) == (left_out == "position")


@pytest.mark.parametrize("main_module", ["HSTU", "SASRec"])
def test_positions_begin_as_published(main_module: str) -> None:
    """HSTU draws the matrices of its input preprocessor anew, SASRec leaves their truncated normal: ML-1M's shape."""
    shape = {"max_sequence_length": 200, "gr_output_length": 10, "item_embedding_dim": 50}
    rated = {"input_preprocessor": "LearnablePositionalEmbeddingRated", "rating_embedding_dim": 8}
    torch.manual_seed(0)
    positions = build_model(settings(main_module=main_module, **shape), catalogue()).sequence.preprocessor.position
    expected = math.sqrt(2 / (211 + 50)) if main_module == "HSTU" else 0.88 / math.sqrt(50)
    assert positions.std().item() == pytest.approx(expected, rel=0.02)
    assert (positions.abs().max() > 2.5 * expected) == (main_module == "HSTU")
    ratings = build_model(settings(main_module=main_module, **shape, **rated), catalogue()).sequence.preprocessor.rating
    assert ratings.std().item() == pytest.approx(math.sqrt(2 / 14) if main_module == "HSTU" else 0.0176, rel=0.3)
