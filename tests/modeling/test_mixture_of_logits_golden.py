"""The mixture of logits against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.build.factories import create_mol_interaction_module
from generative_recommenders.modeling.similarity import mixture_of_logits
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from golden_parity import assert_near, read_golden

OURS = {
    "_query_embeddings_fn._query_emb_proj_module.1._w": "query_projection.1.linear.weight",
    "_query_embeddings_fn._query_emb_proj_module.1._b": "query_projection.1.linear.bias",
    "_query_embeddings_fn._query_emb_proj_module.2": "query_projection.2",
    "_item_embeddings_fn._item_emb_proj_module.1._w": "item_projection.1.linear.weight",
    "_item_embeddings_fn._item_emb_proj_module.1._b": "item_projection.1.linear.bias",
    "_item_embeddings_fn._item_emb_proj_module.2": "item_projection.2",
    "_gating_fn._query_only_partial_module.0": "query_gate.1",
    "_gating_fn._query_only_partial_module.2": "query_gate.3",
    "_gating_fn._item_only_partial_module": "item_gate",
    "_gating_fn._qi_partial_module": "cross_gate",
}


def our_name(name: str) -> str:
    prefix = max((p for p in OURS if name.startswith(p)), key=len)
    return OURS[prefix] + name.removeprefix(prefix)


def our_layout(name: str, array: torch.Tensor) -> torch.Tensor:
    """The reference keeps the gated unit's weight as [in, out] and its bias as [1, out]."""
    return array.T if name.endswith("._w") else array[0] if name.endswith("._b") else array


def golden_case() -> tuple[dict[str, torch.Tensor], dict, MoLSimilarity]:
    arrays, meta = read_golden("meta_mol")
    config = meta["config"]
    model = create_mol_interaction_module(
        config["query_dim"],
        config["item_dim"],
        query_dot_product_groups=config["groups_q"],
        item_dot_product_groups=config["groups_i"],
        dot_product_dimension=config["dp_dim"],
        temperature=config["temperature"],
        query_hidden_dim=config["q_hidden"],
        item_hidden_dim=config["i_hidden"],
        gating_query_hidden_dim=config["gq"],
        gating_qi_hidden_dim=config["gqi"],
        gating_item_hidden_dim=config["gi"],
        query_nonlinearity="swiglu",
        item_nonlinearity="swiglu",
    )
    parameters = {n.removeprefix("param/"): v for n, v in arrays.items() if n.startswith("param/")}
    model.load_state_dict({our_name(n): our_layout(n, v) for n, v in parameters.items()})
    return arrays, config, model


def test_golden_outputs_in_evaluation():
    arrays, config, model = golden_case()
    model.eval()
    query = arrays["input/query"]
    scores, losses = model(query, arrays["input/items_shared"])
    assert_near(scores, arrays["output/logits"], 1e-4)
    assert_near(model(query, arrays["input/items_batched"])[0], arrays["output/logits_batched"], 1e-4)
    assert losses == {}
    components = model.query_components(query)[0].components * config["temperature"]
    assert_near(components, arrays["output/query_components"], 1e-4)
    items = model.item_components(arrays["input/items_shared"]).components
    assert_near(items, arrays["output/item_components_shared"], 1e-4)


def test_golden_training():
    arrays, _, model = golden_case()
    scores, losses = model.train()(arrays["input/query"], arrays["input/items_shared"])
    assert_near(scores, arrays["output/train_logits"], 1e-4)
    assert_near(losses["mi_loss"], arrays["output/train_mi_loss"], 1e-4)


@pytest.mark.parametrize("floats", [2**24, 1])
def test_golden_gradients(monkeypatch, floats):
    monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", floats)
    monkeypatch.setattr(mixture_of_logits, "KEPT_FLOATS", floats)
    arrays, config, model = golden_case()
    model.eval()
    query = arrays["input/query"].clone().requires_grad_()
    items = arrays["input/items_shared"].clone().requires_grad_()
    (model(query, items)[0] * arrays["input/cotangent"]).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours |= {"query": query.grad, "items_shared": items.grad}
    golden = {n.removeprefix("grad/"): v for n, v in arrays.items() if n.startswith("grad/")}
    assert len(golden) == len(ours)
    for name, value in golden.items():
        known = name if name in ("query", "items_shared") else our_name(name)
        assert_near(ours[known], our_layout(name, value), 5e-4)
