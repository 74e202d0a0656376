"""Mixture-of-logits similarity: scores, gates, dropout, precision and options."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from generative_recommenders.build.factories import create_mol_interaction_module
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.similarity import mixture_of_logits, mol_components
from generative_recommenders.modeling.similarity.mixture_of_logits import MoLSimilarity
from generative_recommenders.objectives.negative_samplers import LocalNegativesSampler, Sharing
from generative_recommenders.objectives.scoring import sampled_scores
from generative_recommenders.ops.counter_random import stream_key

SMALL: dict[str, Any] = {
    "query_dot_product_groups": 3,
    "item_dot_product_groups": 2,
    "dot_product_dimension": 4,
    "query_hidden_dim": 5,
    "gating_query_hidden_dim": 6,
    "gating_item_hidden_dim": 7,
    "gating_qi_hidden_dim": 8,
}


def small_model(seed: int = 0, **options) -> MoLSimilarity:
    torch.manual_seed(seed)
    return create_mol_interaction_module(6, 5, **{**SMALL, **options})


def finished(model: MoLSimilarity, result: tuple) -> tuple:
    """Scores with the auxiliary losses made from their sums."""
    return result[0], model.auxiliary_losses(result[1])


def slow_scores(model: MoLSimilarity, combination: str, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """One pair at a time from the formulas of the papers."""
    rows = []
    for q in queries:
        row = []
        for x in items:
            f_q = torch.nn.functional.normalize(model.query_projection(q).view(-1, model.dot_product_dimension))
            f_x = torch.nn.functional.normalize(model.item_projection(x).view(-1, model.dot_product_dimension))
            logits = torch.stack([a @ b / model.logit_temperature for a in f_q for b in f_x])
            gate = model.query_gate(q) * model.item_gate(x) + model.cross_gate(logits)
            inner = gate if combination == "glu_silu" else (gate - gate.mean())
            if combination == "glu_silu_ln":
                inner = inner / (gate.var(unbiased=False) + 1e-5).sqrt()
            weights = (gate * torch.sigmoid(inner)).softmax(0)
            row.append((weights * logits).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("combination", ["glu_silu", "glu_silu_ln"])
@pytest.mark.parametrize("item_hidden_dim", [-1, 4])
def test_scores_equal_the_formulas(combination, item_hidden_dim):
    model = small_model(gating_combination_type=combination, item_hidden_dim=item_hidden_dim).eval()
    queries, items = torch.randn(3, 6), torch.randn(4, 5)
    torch.testing.assert_close(
        model(queries, items)[0], slow_scores(model, combination, queries, items), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("query_fn, item_fn", [(True, True), (True, False), (False, True), (False, False)])
def test_combination_none_adds_the_gates_that_exist(query_fn, item_fn):
    model = small_model(gating_combination_type="none", gating_query_fn=query_fn, gating_item_fn=item_fn).eval()
    queries, items = torch.randn(2, 6), torch.randn(3, 5)
    query, _ = model.query_components(queries)
    logits = torch.einsum("bnd,xmd->bxnm", query.components, model.item_components(items).components).flatten(2)
    gate = model.cross_gate(logits)
    if query_fn:
        gate = gate + model.query_gate(queries)[:, None]
    if item_fn:
        gate = gate + model.item_gate(items)
    torch.testing.assert_close(model(queries, items)[0], (gate.softmax(-1) * logits).sum(-1))


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_change_neither_scores_nor_losses_nor_gradients(monkeypatch, shared):
    """In double precision, so that the order of sums does not decide."""
    model = small_model(uid_embedding_hash_sizes=(4,), uid_dropout_rate=0.0).double().train()
    users = torch.arange(7)
    items = (torch.randn(9, 5) if shared else torch.randn(7, 9, 5)).double()
    queries = torch.randn(7, 6).double()
    results = []
    for floats, kept in ((2**24, 2**24), (900, 2**24), (900, 0), (1, 0)):
        monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", floats)
        monkeypatch.setattr(mixture_of_logits, "KEPT_FLOATS", kept)
        model.zero_grad()
        leaf = items.clone().requires_grad_()
        scores, losses = model.score(queries, leaf, users)
        (scores.square().sum() + sum(losses.values())).backward()
        results.append([scores.detach(), *losses.values(), leaf.grad, *[p.grad for p in model.parameters()]])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept_floats, recomputed", [(2**24, 0), (900, 1)])
def test_many_pairs_are_computed_again_in_the_backward_pass(monkeypatch, kept_floats, recomputed):
    monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", 900)
    monkeypatch.setattr(mixture_of_logits, "KEPT_FLOATS", kept_floats)
    model, calls = small_model(), []
    model.cross_gate.register_forward_hook(lambda *_: calls.append(1))
    scores, _ = model(torch.randn(7, 6), torch.randn(7, 9, 5))
    blocks = len(calls)
    scores.sum().backward()
    assert blocks > 1
    assert len(calls) == blocks * (1 + recomputed)


def test_dropout_inside_blocks_is_drawn_once(monkeypatch):
    monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", 600)
    monkeypatch.setattr(mixture_of_logits, "KEPT_FLOATS", 0)
    model = small_model(softmax_dropout_rate=0.5, gating_qi_dropout_rate=0.3, item_dropout_rate=0.3).double()
    queries, items = torch.randn(3, 6).double(), torch.randn(3, 4, 5).double().requires_grad_()

    def run(x):
        torch.manual_seed(5)
        return model(queries, x)[0]

    torch.testing.assert_close(run(items), run(items))
    assert torch.autograd.gradcheck(run, (items,), eps=1e-6, atol=1e-4)


def test_components_made_before_give_the_same_scores(monkeypatch):
    model = small_model().eval()
    queries, items = torch.randn(6, 6), torch.randn(8, 5)
    query, _ = model.query_components(queries)
    parts = model.item_components(items)
    scores = model(queries, items)[0]
    torch.testing.assert_close(model.score_components(query, parts), scores)
    rows = torch.randint(0, 8, (6, 4))
    monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", 500)
    torch.testing.assert_close(model.score_components(query, parts, rows), scores.gather(1, rows))


def test_rows_of_a_table_equal_gathered_items():
    model = small_model(uid_embedding_hash_sizes=(4,), uid_dropout_rate=0.0).train()
    queries, rows, users = torch.randn(6, 6), torch.randint(0, 8, (6, 4)), torch.arange(6)
    table = torch.randn(8, 5, requires_grad=True)
    results = []
    for call in (
        lambda: model.score(queries, table[rows], users),
        lambda: finished(model, model.score_rows(queries, table, rows, users)),
    ):
        table.grad = None
        scores, losses = call()
        (scores.square().sum() + sum(losses.values())).backward()
        results.append([scores.detach(), losses, table.grad])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_shared_negatives_equal_those_gathered_for_every_query(monkeypatch):
    model = small_model(uid_embedding_hash_sizes=(4,), uid_dropout_rate=0.0).train()
    queries, users = torch.randn(7, 6), torch.arange(7)
    table, drawn = torch.randn(8, 5, requires_grad=True), torch.randint(0, 8, (3, 4))
    spans = [slice(0, 2), slice(2, 5), slice(5, 7)]
    gathered = drawn[torch.tensor([0, 0, 1, 1, 1, 2, 2])]
    results = []
    for floats in (1 << 25, 500):
        monkeypatch.setattr(mixture_of_logits, "BLOCK_FLOATS", floats)
        monkeypatch.setattr(mixture_of_logits, "KEPT_FLOATS", floats)
        for rows in (gathered, zip(spans, drawn)):
            table.grad = None
            scores = model.score_negatives(queries, table, rows, users)
            scores.square().sum().backward()
            results.append([scores.detach(), table.grad])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-4, rtol=1e-4)


def test_item_dropout_is_drawn_for_every_pair_unless_it_is_shared():
    queries, items = torch.randn(1, 6).repeat(400, 1), torch.randn(1, 5)
    rows = torch.zeros(400, 2, dtype=torch.int64)

    def draws(**options) -> tuple[int, int]:
        """Different scores of one pair among all queries, and rows whose two scores of it differ."""
        scores, _ = small_model(**{"item_dropout_rate": 0.3, **options}).train().score_rows(queries, items, rows)
        scores = scores.detach().mul(1e3).round()
        return len(scores.unique()), int((scores[:, 0] != scores[:, 1]).sum())

    of_pairs, within = draws()
    assert of_pairs > 20 and within > 200  # five inputs: 32 masks at most
    assert draws(item_dropout_shared=True) == (1, 0)
    of_gates, within = draws(item_dropout_rate=0.0, gating_item_dropout_rate=0.3)
    assert of_gates > 10 and within > 200


@pytest.mark.parametrize("dropped", ["item_dropout_rate", "gating_item_dropout_rate"])
def test_items_made_for_every_pair_score_as_those_made_once(dropped):
    """A rate that drops nothing has items' components, or their gates too, made for every pair."""
    queries, rows = torch.randn(40, 6), torch.randint(0, 8, (40, 3))
    table = torch.randn(8, 5, requires_grad=True)
    results = []
    for rate in (0.0, 1e-12):
        model = small_model(**{dropped: rate}).train()
        table.grad = None
        scores, losses = finished(model, model.score_rows(queries, table, rows))
        (scores.square().sum() + losses["mi_loss"]).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append([scores.detach(), table.grad, gradients])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_positives_and_negatives_have_draws_of_their_own():
    model = small_model(uid_embedding_hash_sizes=(4,), uid_dropout_rate=0.5).train()
    queries, items, users = torch.randn(50, 6), torch.randn(9, 5), torch.arange(1, 51)
    rows = torch.randint(0, 9, (50, 1))
    positive, _ = model.score_rows(queries, items, rows, users)
    negative = model.score_negatives(queries, items, rows, users)
    assert (positive != negative).float().mean() > 0.5


def test_mutual_information_is_of_the_positives_pairs_alone():
    model = small_model().train()
    queries, table = torch.randn(30, 6), torch.randn(9, 5)
    rows = torch.randint(0, 9, (30, 1))
    _, sums = model.score_rows(queries, table, rows)
    expected = model(queries, table[rows])[1]["mi_loss"]
    torch.testing.assert_close(model.auxiliary_losses(sums)["mi_loss"], expected)
    assert sums["mi_loss"][-1] == 30
    weight = torch.cat([torch.zeros(1, 5), table])
    negatives = LocalNegativesSampler(9, 20, Sharing())(stream_key(0), 0, 30)
    scores = sampled_scores(queries, ItemRows(weight), rows[:, 0] + 1, negatives, model, torch.arange(30))
    torch.testing.assert_close(scores.sums["mi_loss"], sums["mi_loss"])


def test_every_matrix_begins_as_published():
    """ML-1M's mixture: Xavier normal over all matrices, the gated unit and its bias of one row too."""
    torch.manual_seed(0)
    model = create_mol_interaction_module(50, 50, uid_embedding_hash_sizes=(6040,))
    for name, parameter in model.named_parameters():
        gated = name.endswith("linear.bias")
        rows, columns = (1, len(parameter)) if gated else (*parameter.shape, 0)[:2]
        if columns:
            expected = math.sqrt(2 / (rows + columns))
            assert parameter.std().item() == pytest.approx(expected, rel=4 / math.sqrt(parameter.numel())), name
            within = (parameter.abs() < expected).float().mean().item()
            assert within == pytest.approx(0.683, abs=2 / math.sqrt(parameter.numel())), name  # a normal's
        elif name == "query_projection.2.bias":  # as torch draws it: uniform within 1 / sqrt(512)
            assert parameter.abs().max().item() == pytest.approx(512**-0.5, rel=0.02)
            assert parameter.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.1)
        else:
            assert not parameter.any(), name
    assert model.query_projection[1].linear.weight.std().item() == pytest.approx(0.043, abs=5e-4)
    assert model.user_tables[0].weight.std().item() == pytest.approx(0.018, abs=2e-4)


def test_lines_of_the_log_say_which_published_code_ignores_an_option(caplog):
    queries, items = torch.randn(2, 6), torch.randn(3, 5)
    scores = {name: small_model(1, query_nonlinearity=name).eval()(queries, items)[0] for name in ("swiglu", "geglu")}
    assert not torch.allclose(scores["swiglu"], scores["geglu"])
    torch.testing.assert_close(small_model(1).eval()(queries, items)[0], scores["geglu"])  # rails' default
    mol_components.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="absl"):
        small_model(query_nonlinearity="swiglu")
        assert not caplog.records
        small_model(query_nonlinearity="swiglu", item_nonlinearity="reglu")
        for _ in range(2):
            small_model(uid_embedding_hash_sizes=(3,))
        small_model(query_nonlinearity="glu")
    idle, acting, tables, glu = (record.getMessage() for record in caplog.records)
    assert "item_nonlinearity = reglu has no effect: item_hidden_dim" in idle
    assert "query_nonlinearity = geglu acts, as in rails' code; Meta's is swiglu" in acting
    assert "uid_embedding_hash_sizes acts, as in rails' code; Meta's ignores it" in tables
    assert "query_nonlinearity = glu acts; it is swiglu in rails' and Meta's code" in glu


def test_user_tables_act_only_when_on():
    model = small_model(uid_embedding_hash_sizes=[5, 3], uid_dropout_rate=0.0)
    queries, items = torch.randn(1, 6).repeat(3, 1), torch.randn(4, 5)
    scores, losses = model(queries, items, torch.tensor([2, 17, 3]))
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    first, second = (table.weight for table in model.user_tables)
    expected = (2 * first[2].square().sum() + first[3].square().sum()) / 3
    expected = expected + (2 * second[2].square().sum() + second[0].square().sum()) / 3
    torch.testing.assert_close(losses["uid_embedding_l2_norm"], expected)
    assert model.auxiliary_loss_names == losses.keys() == {"mi_loss", "uid_embedding_l2_norm"}
    assert model.eval()(queries, items, torch.tensor([2, 17, 3]))[1] == {}
    assert small_model().auxiliary_loss_names == {"mi_loss"}
    assert create_mol_interaction_module(6, 5, False, **SMALL)(queries, items)[1] == {}


def test_missing_user_ids_are_reported():
    with pytest.raises(UserError, match="user ids"):
        small_model(uid_embedding_hash_sizes=(5,))(torch.randn(1, 6), torch.randn(2, 5))


@pytest.mark.parametrize("whole", [True, False])
def test_user_dropout_drops_vectors_or_elements(whole):
    model = small_model(uid_embedding_hash_sizes=(50,), uid_dropout_rate=0.5, uid_embedding_level_dropout=whole).train()
    components = model.query_components(torch.randn(400, 6), torch.arange(400))[0].components[:, -1]
    zeros = (components == 0).float().mean(1)
    assert abs(float(zeros.mean()) - 0.5) < 0.1
    assert bool(((zeros == 0) | (zeros == 1)).all()) is whole


def test_softmax_dropout_keeps_a_mixture():
    model = small_model(softmax_dropout_rate=0.5, dot_product_l2_norm=True, temperature=1.0).train()
    queries, items = torch.randn(50, 6), torch.randn(20, 5)
    scores, _ = model(queries, items)
    plain = model.eval()(queries, items)[0]
    assert scores.abs().max().item() <= 1.0 + 1e-5
    assert not torch.allclose(scores, plain)


def test_bf16_acts_in_training_and_evaluation_and_keeps_float32_scores():
    model = small_model(bf16_training=True).train()
    queries, items = torch.randn(4, 6), torch.randn(5, 5)
    exact = create_mol_interaction_module(6, 5, **SMALL)
    exact.load_state_dict(model.state_dict())
    scores = model(queries, items)[0]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact(queries, items)[0])
    torch.testing.assert_close(scores, exact(queries, items)[0], atol=0.5, rtol=0.1)
    evaluated, plain = (each.eval()(queries, items)[0] for each in (model, exact))
    assert not torch.equal(evaluated, plain)
    torch.testing.assert_close(evaluated, plain, atol=0.5, rtol=0.1)
    torch.testing.assert_close(model.scores(queries, model.snapshot(items), None), evaluated)


def test_no_queries_and_no_items():
    model = small_model().train()
    scores, losses = model(torch.zeros(0, 6), torch.randn(3, 5))
    assert scores.shape == (0, 3)
    assert losses["mi_loss"].item() == 0.0
    assert model(torch.randn(2, 6), torch.zeros(0, 5))[0].shape == (2, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"query_nonlinearity": "relu"},
        {"item_nonlinearity": "tanh"},
        {"gating_combination_type": "sum"},
        {"temperature": 0.0},
        {"softmax_dropout_rate": 1.0},
        {"uid_embedding_hash_sizes": (3, 3, 3)},
        {"uid_embedding_hash_sizes": (0,)},
        {"gating_item_fn": False},
        {"item_dot_product_groups": 0},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options)).split("_fn")[0]):
        small_model(**options)


def test_identity_takes_the_embedding_as_its_first_component() -> None:
    chosen = {
        **SMALL,
        "query_use_identity_fn": True,
        "item_use_identity_fn": True,
        "dot_product_l2_norm": False,
    }
    model = create_mol_interaction_module(6, 4, **{**chosen, "temperature": 1.0}).eval()
    queries, items = torch.randn(3, 6), torch.randn(5, 4)
    query, _ = model.query_components(queries)
    item = model.item_components(items)
    torch.testing.assert_close(query.components[:, 0], queries[:, :4])
    torch.testing.assert_close(item.components[:, 0], items)
    assert (query.components.shape, item.components.shape) == ((3, 3, 4), (5, 2, 4))
    assert sum(p.numel() for p in model.item_projection.parameters()) == 4 * 4 + 4  # of the second component
    one = create_mol_interaction_module(6, 4, **{**chosen, "item_dot_product_groups": 1})
    assert list(one.item_projection.parameters()) == []


@pytest.mark.parametrize("side", ["query", "item"])
def test_identity_of_a_narrow_embedding_is_refused(side: str) -> None:
    with pytest.raises(UserError, match=f"{side}_use_identity_fn takes dot_product_dimension = 4 .* of 3"):
        create_mol_interaction_module(3, 3, **{**SMALL, f"{side}_use_identity_fn": True})


@pytest.mark.parametrize("sizes", [(), (7,)])
def test_decay_of_user_embeddings_needs_them(sizes: tuple[int, ...]) -> None:
    decay = 0.1 if not sizes else -0.1
    with pytest.raises(UserError, match="uid_embedding_l2_weight_decay"):
        small_model(uid_embedding_hash_sizes=sizes, uid_embedding_l2_weight_decay=decay)


def test_one_hash_size_is_no_list_of_them() -> None:
    with pytest.raises(UserError, match=r"uid_embedding_hash_sizes must be of type tuple\[int, ...\] \| None, got 5"):
        small_model(uid_embedding_hash_sizes=5)


def test_activation_checkpoint_computes_all_blocks_again() -> None:
    model, calls = small_model(activation_checkpoint=True), []
    model.cross_gate.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 6), torch.randn(3, 5))[0].sum().backward()
    assert len(calls) == 2


def test_eps_bounds_the_norm_that_components_are_divided_by() -> None:
    items = torch.randn(3, 5)
    near, far = (small_model(eps=eps).eval().item_components(items).components for eps in (1e-6, 1e3))
    torch.testing.assert_close(near.norm(dim=-1), torch.ones(3, 2))
    assert far.norm(dim=-1).max() < 0.1
