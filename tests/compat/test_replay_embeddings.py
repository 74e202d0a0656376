"""RePlay's embeddings and their head."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.compat.replay.data import FeatureHint, FeatureType
from generative_recommenders.compat.replay.data.nn import TensorFeatureInfo, TensorSchema
from generative_recommenders.compat.replay.nn.embedding import (
    CategoricalEmbedding,
    IdentityEmbedding,
    NumericalEmbedding,
    SequenceEmbedding,
)
from generative_recommenders.compat.replay.nn.head import EmbeddingTyingHead
from generative_recommenders.errors import UserError
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


def categorical(padding: int, cardinality: int = 4) -> CategoricalEmbedding:
    kind, hint = FeatureType.CATEGORICAL, FeatureHint.ITEM_ID
    return CategoricalEmbedding(TensorFeatureInfo("item", kind, True, hint, None, cardinality, padding, 3))


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_weight_leaves_out_padding(padding: int) -> None:
    module = categorical(padding)
    ids = [i for i in range(5) if i != padding]
    assert module.emb.weight.shape == (5, 3) and module.embedding_dim == 3
    assert torch.equal(module.weight, module(torch.tensor(ids)))
    assert torch.equal(module(torch.tensor([padding])), torch.zeros(1, 3))
    with pytest.raises(IndexError):
        module(torch.tensor([5]))


def test_bad_categories_are_refused() -> None:
    with pytest.raises(UserError, match=r"padding id 5 lies outside 0\.\.4"):
        categorical(5)
    with pytest.raises(UserError, match="cardinality"):
        categorical(0, cardinality=0)


def test_lists_of_numbers_are_linear_or_pass() -> None:
    vectors = torch.randn(2, 5, 3)
    listed, same = (
        NumericalEmbedding(TensorFeatureInfo("v", FeatureType.NUMERICAL_LIST, embedding_dim=d, tensor_dim=3))
        for d in (4, 3)
    )
    assert torch.allclose(listed(vectors), vectors @ listed.weight.T + listed.linear.bias, atol=1e-6)
    assert torch.equal(same(vectors), vectors) and torch.equal(same.weight, torch.eye(3))
    assert list(same.parameters()) == []


@pytest.mark.parametrize("sizes", [{"tensor_dim": 3, "embedding_dim": 3}, {"tensor_dim": 3}, {"embedding_dim": 3}])
def test_identity_takes_a_feature_and_passes_values_on(sizes: dict) -> None:
    module = IdentityEmbedding(TensorFeatureInfo("v", FeatureType.NUMERICAL_LIST, **sizes))
    values = torch.randn(2, 3)
    assert module(values) is values and module.embedding_dim == 3
    assert torch.equal(values @ module.weight, values)


def test_sequence_embedding_names_what_is_missing() -> None:
    genre = TensorFeatureInfo("genre", FeatureType.CATEGORICAL, True, cardinality=3, padding_value=3)
    module = SequenceEmbedding(TensorSchema([genre]))
    assert module.embeddings_dim == {"genre": 64}
    with pytest.raises(UserError, match="no item id"):
        module.get_item_weights()
    with pytest.raises(UserError, match="excluded"):
        SequenceEmbedding(TensorSchema([genre]), excluded_features=["genre"])
