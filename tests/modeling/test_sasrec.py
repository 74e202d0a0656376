"""SASRec: parity with the authors' numbers and with RePlay's layer, and what the encoder promises."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.nn.sequential import SasRecTransformerLayer
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.ops.layout import jagged_layout, padded_layout
from golden_encoders import ENTRANCES, assert_parity, choose_backend, recommender_of
from golden_parity import GoldenFile, assert_near, load_golden


@pytest.mark.parametrize("backend", ["torch", "fbgemm"])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("case", ["meta_sasrec", "meta_sasrec_gelu_layernorm"])
def test_parity(monkeypatch: pytest.MonkeyPatch, case: str, entrance: str, backend: str) -> None:
    choose_backend(monkeypatch, backend)
    golden = load_golden(case)
    c = golden.config
    encoder = SASRec(c["embedding_dim"], c["num_blocks"], c["num_heads"], c["ffn_hidden_dim"], c["activation"], 0.0)
    assert_parity(recommender_of(golden, encoder), golden, entrance)


def replay_encoder(golden: GoldenFile) -> SASRec:
    c = golden.config
    encoder = SASRec(c["D"], c["num_blocks"], c["heads"], c["hidden"] or c["D"], c["activation"], 0.0, True)
    with torch.no_grad():
        for name, parameter in replay_names(encoder).items():
            parameter.copy_(golden.parameters[name].reshape(parameter.shape))
    return encoder.eval()


def replay_names(encoder: SASRec) -> dict[str, torch.nn.Parameter]:
    modules = {
        "attention_layers.{}.out_proj.": "out_proj",
        "attention_layernorms.{}.": "query_norm",
        "forward_layernorms.{}.": "ffn_norm",
        "forward_layers.{}.linear1.": "ffn_in",
        "forward_layers.{}.linear2.": "ffn_out",
        "attention_layers.{}.in_proj_": "in_proj",
    }
    return {
        theirs.format(index) + part: getattr(getattr(block, ours), part)
        for index, block in enumerate(encoder.blocks)
        for theirs, ours in modules.items()
        for part in ("weight", "bias")
    }


def to_the_left(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Left-padded rows as right-padded ones."""
    return torch.stack([row.roll(-int((~mask).sum()), 0) for row, mask in zip(x, real)])


@pytest.mark.parametrize("jagged", [True, False])
def test_parity_with_replays_layer(jagged: bool) -> None:
    golden = load_golden("replay_sasrec_layer")
    encoder, real = replay_encoder(golden), golden.inputs["padding_mask"]
    lengths = real.sum(1)
    layout = (jagged_layout if jagged else padded_layout)(lengths, real.shape[1])
    x = golden.inputs["x"].requires_grad_()
    out = layout.to_rectangle(encoder(layout.flatten(to_the_left(x, real)), layout, {}))
    seen = torch.arange(real.shape[1]) < lengths[:, None]
    assert_near(out[seen], to_the_left(golden.outputs["out"], real)[seen])
    assert_near(out[seen], to_the_left(golden.outputs["out_train"], real)[seen])


def test_gradients_equal_those_of_replays_layer() -> None:
    golden = load_golden("replay_sasrec_layer")
    encoder, c = replay_encoder(golden), golden.config
    layer = SasRecTransformerLayer(c["D"], c["heads"], c["num_blocks"], 0.0, c["activation"], c["hidden"])
    layer.load_state_dict({name: parameter.data for name, parameter in replay_names(encoder).items()})
    x, real = golden.inputs["x"], torch.ones_like(golden.inputs["padding_mask"])
    lengths = real.sum(1)
    layout = jagged_layout(lengths, x.shape[1])
    causal = torch.zeros(x.shape[0] * c["heads"], x.shape[1], x.shape[1])
    causal.masked_fill_(torch.ones_like(causal).triu(1).bool(), torch.finfo(x.dtype).min)
    dense = layer.eval()({}, x, real, causal)
    core = layout.to_rectangle(encoder(layout.flatten(x), layout, {}))
    assert_near(core, dense.detach())
    for out in (core, dense):
        (out * golden.inputs["cotangent"]).sum().backward()
    theirs = dict(layer.named_parameters())
    for name, parameter in replay_names(encoder).items():
        assert_near(parameter.grad, theirs[name].grad, 1e-4)


def test_final_norm() -> None:
    plain, normed = SASRec(8, 1, 2), SASRec(8, 1, 2, final_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    layout = jagged_layout(torch.tensor([3, 2]), 3)
    x = torch.randn(5, 8)
    expected = torch.nn.functional.layer_norm(plain.eval()(x, layout, {}), (8,))
    torch.testing.assert_close(normed.eval()(x, layout, {}), expected)
