"""The authors' encoders rebuilt from golden files: which of their parameters is which of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.input_preprocessors import (
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.inputs import history_inputs
from generative_recommenders.modeling.items import LocalEmbeddingModule
from generative_recommenders.modeling.model import SequenceEncoder, SequenceRecommender
from generative_recommenders.modeling.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
    LayerNormEmbeddingPostprocessor,
)
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.ops import dispatch
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.types import SequentialFeatures
from golden_parity import GoldenFile, assert_near

POSTPROCESSORS = {"l2": L2NormEmbeddingPostprocessor, "layernorm": LayerNormEmbeddingPostprocessor}
ENTRANCES = ["padded", "jagged"]


def choose_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Jagged operators by fbgemm or by torch; skips where fbgemm does not work."""
    if name == "fbgemm" and not dispatch.fbgemm_runs_on("cpu"):
        pytest.skip("no working fbgemm")
    monkeypatch.setattr(dispatch, "fbgemm_runs_on", lambda device_type: name == "fbgemm")


def recommender_of(golden: GoldenFile, encoder: torch.nn.Module) -> SequenceRecommender:
    """The encoder between positions and the file's postprocessor, with its parameters, in evaluation mode."""
    c = golden.config
    preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(c["position_rows"], c["embedding_dim"], 0.0)
    sequence = SequenceEncoder(preprocessor, encoder, POSTPROCESSORS[c.get("postprocessor", "l2")]())
    items = LocalEmbeddingModule(c["num_items"], c["embedding_dim"])
    model = SequenceRecommender(items, sequence, DotProductSimilarity()).eval()
    with torch.no_grad():
        for name, parameter in named(model):
            parameter.copy_(golden.parameters[name].reshape(parameter.shape))
    return model


def named(model: SequenceRecommender) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Our parameters by the authors' names."""
    yield "_embedding_module._item_emb.weight", model.items.table
    yield "_input_features_preproc._pos_emb.weight", model.sequence.preprocessor.position
    of_block = _sasrec_block if isinstance(model.sequence.encoder, SASRec) else _hstu_block
    for index, block in enumerate(model.sequence.encoder.blocks):
        yield from of_block(index, block)


def _sasrec_block(index: int, block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    attention, forward = f"attention_layers.{index}.", f"forward_layers.{index}._conv1d."
    for part in ("weight", "bias"):
        yield f"{attention}in_proj_{part}", getattr(block.in_proj, part)
        yield f"{attention}out_proj.{part}", getattr(block.out_proj, part)
        yield f"{forward}0.{part}", getattr(block.ffn_in, part)
        yield f"{forward}3.{part}", getattr(block.ffn_out, part)


def _hstu_block(index: int, block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    layer = f"_hstu._attention_layers.{index}."
    yield f"{layer}_uvqk", block.uvqk
    yield f"{layer}_o.weight", block.output.weight
    yield f"{layer}_o.bias", block.output.bias
    if block.bias is not None:
        yield f"{layer}_rel_attn_bias._pos_w", block.bias.position
        yield f"{layer}_rel_attn_bias._ts_w", block.bias.time


def assert_parity(model: SequenceRecommender, golden: GoldenFile, entrance: str) -> None:
    """Outputs, the last states and the gradients of all parameters, through one of the two entrances."""
    lengths, ids = golden.inputs["past_lengths"].long(), golden.inputs["past_ids"].long()
    events = {name: golden.inputs[name] for name in ("timestamps",) if name in golden.inputs}
    if entrance == "padded":
        encoded = model(lengths, ids, None, events)
    else:
        layout = jagged_layout(lengths, ids.shape[1])
        encoded = layout.to_rectangle(model.states(history_inputs(SequentialFeatures(lengths, ids, events))))
    assert_near(encoded, golden.outputs["encoded"])
    assert_near(model.encode_query(SequentialFeatures(lengths, ids, events)).states, golden.outputs["encode"])
    (encoded * golden.inputs["cotangent"]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in named(model)}
    assert set(golden.gradients) == set(gradients)
    for name, expected in golden.gradients.items():
        first = 1 if name.endswith("_item_emb.weight") else 0  # padding's row has no part in the model
        assert_near(gradients[name].reshape(expected.shape)[first:], expected[first:], 1e-4)
