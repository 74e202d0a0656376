"""RePlay's embeddings and their head."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.data.schema import (
    FeatureHint,
    FeatureType,
    TensorFeatureInfo,
    TensorSchema,
)
from generative_recommenders.compat.replay.nn.sequential.sasrec import EmbeddingTyingHead, SequenceEmbedding
from golden_parity import assert_gradients, assert_near, load_golden, load_parameters


@pytest.mark.parametrize("hidden", [(3, 4), (3, 5, 4)])
def test_head_takes_the_documented_shapes(hidden: tuple[int, ...]) -> None:
    states, shared, own = torch.randn(hidden), torch.randn(6, 4), torch.randn(3, 6, 4)
    head = EmbeddingTyingHead()
    assert torch.allclose(head(states, shared), states @ shared.T, atol=1e-6)
    letters = "bd,bvd->bv" if len(hidden) == 2 else "bnd,bvd->bnv"
    assert torch.allclose(head(states, own), torch.einsum(letters, states, own), atol=1e-6)


def test_sequence_embedding_parity() -> None:
    golden = load_golden("replay_sequence_embedding")
    c = golden.config

    def feature(name, kind, cardinality=None, width=None):
        hint = FeatureHint.ITEM_ID if name == "item_id" else None
        return TensorFeatureInfo(name, kind, True, hint, None, cardinality, cardinality or 0, c["D"], width)

    schema = TensorSchema(
        [
            feature("item_id", FeatureType.CATEGORICAL, c["V"]),
            feature("cat", FeatureType.CATEGORICAL, c["C"]),
            feature("tags", FeatureType.CATEGORICAL_LIST, c["T"]),
            feature("price", FeatureType.NUMERICAL, width=1),
            feature("vector", FeatureType.NUMERICAL_LIST, width=c["vec"]),
            feature("same", FeatureType.NUMERICAL_LIST, width=c["D"]),
        ]
    )
    features = {k.removeprefix("feature/"): v for k, v in golden.inputs.items() if k.startswith("feature/")}
    leaves = {f"feature__{k}": v.requires_grad_() for k, v in features.items() if v.is_floating_point()}
    modules = {how: SequenceEmbedding(schema, None, how) for how in ("sum", "mean", "max")}
    for how, module in modules.items():
        load_parameters(module, golden.parameters)
        assert_near(module(features, ["tags"])["tags"], golden.outputs[f"{how}/tags"])
    module = modules[(golden.gradient_of or "sum/all").split("/")[0]]
    out = module(features)
    for name in schema.names:
        if f"sum/{name}" in golden.outputs:
            assert_near(modules["sum"](features)[name], golden.outputs[f"sum/{name}"])
    joined = torch.cat([out[name] for name in ("item_id", "cat", "tags", "price", "vector")], -1)
    assert_near(joined, golden.outputs[golden.gradient_of])
    assert_near(module.get_item_weights(), golden.outputs["item_weights"])
    assert_gradients(golden, joined, module=module, **leaves)


def test_numbers_may_have_an_axis_of_their_own() -> None:
    price = TensorFeatureInfo("price", FeatureType.NUMERICAL, is_seq=True, embedding_dim=4, tensor_dim=1)
    embedding = SequenceEmbedding(TensorSchema([price]))
    values = torch.rand(2, 3)
    plain, wide = (embedding({"price": x})["price"] for x in (values, values[:, :, None]))
    assert plain.shape == (2, 3, 4) and torch.equal(plain, wide)
