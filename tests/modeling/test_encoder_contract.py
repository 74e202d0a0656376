"""Contract of every encoder, loss and objective: causality, padding, save and reload, learning by heart."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from generative_recommenders.build.parts import build_model
from generative_recommenders.config.registry import ENCODERS, OBJECTIVES
from generative_recommenders.modeling.events import token_events
from generative_recommenders.modeling.inputs import Queries, history_inputs
from generative_recommenders.modeling.items import ItemRows
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops.layout import AttentionMask, jagged_layout
from generative_recommenders.types import SequentialFeatures
from tiny_models import EASY, LENGTHS, catalogue, contracted, histories, overfit, settings

CHOICES: dict[str, dict[str, object]] = {
    **{name: {"main_module": name} for name in ENCODERS.names()},
    "SASRec-replay": {"main_module": "SASRec", "sasrec.norm_weights": True, "sasrec.final_norm": True},
    "HSTU-softmax": {"main_module": "HSTU", "hstu.normalization": "softmax_rel_bias"},
    "HSTU-concat": {"main_module": "HSTU", "hstu.concat_ua": True},
    "FuXi-single": {"main_module": "FuXi", "fuxi.ffn_single_stage": True},
    "LiGR-gelu": {"main_module": "LiGR", "ligr.ffn_activation_fn": "gelu", "ligr.ffn_bias": True},
    "HSTU-length": {"main_module": "HSTU", "hstu.attn_divisor": "length"},
    "HSTU-by-time": {"main_module": "HSTU", "hstu.enable_relative_position_bias": False},
    "HSTU-by-position": {"main_module": "HSTU", "hstu.enable_relative_time_bias": False},
    "DiffTransformer-pre": {"main_module": "DiffTransformer", "diff_transformer.norm": "pre"},
    **{
        f"TwoTower-{name}": {"main_module": "TwoTower", "item_tower.query_module": name}
        for name in ENCODERS.names()
        if name not in ("SASRec", "TwoTower")
    },
}
"""Every encoder of the table, and other forms of some."""


def takes_attention_mask(choice: str) -> bool:
    """Whether an encoder of `CHOICES` takes the attention mask of its layout."""
    name = choice.removeprefix("TwoTower-").partition("-")[0]
    return name not in ENCODERS or getattr(ENCODERS[name].make, "takes_attention_mask", True)


PREPROCESSORS = ("LearnablePositionalEmbedding", "LearnablePositionalEmbeddingRated", "CombinedItemAndRating")
POSTPROCESSORS = ("l2_norm", "layer_norm")
MOL = {"interaction_module_type": "MoL", "top_k_method": "MoLBruteForceTopK"}


def build(encoder: str, preprocessor: str, postprocessor: str, mol: bool, seed: int = 0) -> SequenceRecommender:
    chosen = settings(
        **CHOICES[encoder],
        **(MOL if mol else {}),
        input_preprocessor=preprocessor,
        user_embedding_norm=postprocessor,
    )
    torch.manual_seed(seed)
    return build_model(chosen, catalogue()).eval()


COMBINATIONS = [
    pytest.param(
        *(encoder, preprocessor, postprocessor, mol),
        id="-".join(map(str, (encoder, preprocessor, postprocessor, mol))),
        marks=[] if (place + turn) % 2 == after and (place + (turn > 0)) % 2 == mol else [pytest.mark.slow],
    )
    for (place, encoder), (turn, preprocessor), (after, postprocessor), mol in product(
        enumerate(CHOICES), enumerate(PREPROCESSORS), enumerate(POSTPROCESSORS), (False, True)
    )
]
"""Each encoder after each preprocessor, with every postprocessor and similarity once at least; slow tests take all."""


@pytest.mark.parametrize(("encoder", "preprocessor", "postprocessor", "mol"), COMBINATIONS)
@torch.no_grad()
def test_contract(encoder: str, preprocessor: str, postprocessor: str, mol: bool) -> None:
    model = build(encoder, preprocessor, postprocessor, mol)
    ids, events = histories()
    states = model(LENGTHS, ids, past_events=events)
    real = torch.arange(ids.shape[1]) < LENGTHS[:, None]
    assert states[real].isfinite().all() and (states[real] != 0).any(1).all()
    assert (states[~real] == 0).all()
    padded_equals_jagged(model, ids, events, states, real)
    padding_changes_nothing(model, ids, events, states, real)
    if model.sequence.encoder.causal:
        the_future_changes_nothing(model, ids, events, states)
    the_past_matters(model, ids, events, states)
    reloaded = build(encoder, preprocessor, postprocessor, mol, seed=1)
    assert not torch.allclose(reloaded(LENGTHS, ids, past_events=events), states)
    reloaded.load_state_dict(model.state_dict())
    assert torch.equal(reloaded(LENGTHS, ids, past_events=events), states)
    scores_are_those_of_the_similarity(model, states[0, : int(LENGTHS[0])])


def padded_equals_jagged(model, ids, events, states, real) -> None:
    tokens = model.states(history_inputs(SequentialFeatures(LENGTHS, ids, events)))
    torch.testing.assert_close(tokens, states[real], rtol=1e-4, atol=1e-5)
    last = model.encode_query(SequentialFeatures(LENGTHS, ids, events)).states
    for row, length in enumerate(LENGTHS.tolist()):
        expected = states[row, length - 1] if length else torch.zeros_like(last[row])
        torch.testing.assert_close(last[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(LENGTHS, ids, model.embed_history(ids), events), states)


@pytest.mark.parametrize(("preprocessor", "postprocessor"), [*zip(PREPROCESSORS, ("l2_norm", "layer_norm", "l2_norm"))])
@pytest.mark.parametrize("encoder", CHOICES)
def test_gradients_of_the_two_entrances_agree(encoder: str, preprocessor: str, postprocessor: str) -> None:
    model = build(encoder, preprocessor, postprocessor, mol=False)
    ids, events = histories()
    layout = jagged_layout(LENGTHS, ids.shape[1])
    padded = model(LENGTHS, ids, past_events=events)
    jagged = layout.to_rectangle(model.states(history_inputs(SequentialFeatures(LENGTHS, ids, events))))
    unread = (".bias.time",) if encoder == "HSTU-by-position" else ()
    learned = [each for name, each in model.sequence.named_parameters() if not name.endswith(unread)]
    learned.append(model.items.table)
    cotangent = torch.randn_like(padded)
    # Without allow_unused: a parameter that either way leaves out is an error.
    gradients = [torch.autograd.grad((out * cotangent).sum(), learned) for out in (padded, jagged)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", CHOICES)
@torch.no_grad()
def test_a_history_that_fills_its_row(encoder: str) -> None:
    model = build(encoder, "LearnablePositionalEmbedding", "l2_norm", mol=False)
    ids, events = histories()
    width = int(LENGTHS.max())
    ids, events = ids[:, :width], {name: x[:, :width] if x.dim() == 2 else x for name, x in events.items()}
    padded = model(LENGTHS, ids, past_events=events)
    jagged = model.states(history_inputs(SequentialFeatures(LENGTHS, ids, events)))
    torch.testing.assert_close(jagged, padded[torch.arange(width) < LENGTHS[:, None]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", CHOICES)
@torch.no_grad()
def test_a_batch_without_events(encoder: str) -> None:
    model = build(encoder, "CombinedItemAndRating", "l2_norm", mol=False)
    lengths, ids = torch.tensor([0, 0]), torch.zeros(2, 3, dtype=torch.int64)
    assert (model(lengths, ids, None, {"ratings": ids}) == 0).all()
    assert (model.encode_query(SequentialFeatures(lengths, ids, {"ratings": ids})).states == 0).all()


@pytest.mark.parametrize("encoder", CHOICES)
@torch.no_grad()
def test_a_query_is_the_state_after_the_last_event(encoder: str) -> None:
    """Also where the last block computes it alone, in one and several blocks, and of histories without events."""
    for preprocessor in PREPROCESSORS:
        model = build(encoder, preprocessor, "layer_norm", mol=False).double()
        ids, events = histories()
        events = {name: x.double() if x.is_floating_point() else x for name, x in events.items()}
        layout = jagged_layout(LENGTHS, ids.shape[1])
        tokens = token_events(events, LENGTHS, layout)
        x = model.embed_history(layout.flatten(ids))
        expected = layout.at_end(model.sequence(x, layout, tokens))
        torch.testing.assert_close(model.sequence.last(x, layout, tokens), expected, rtol=1e-10, atol=1e-10)


def padding_changes_nothing(model, ids, events, states, real) -> None:
    """What padding holds, further columns of it, and other rows leave a row's states as they were."""
    garbage = {name: x.where(real, 3) if x.dim() == 2 else x for name, x in events.items()}
    torch.testing.assert_close(model(LENGTHS, ids.where(real, 9), None, garbage), states)
    row = slice(3, 4)
    wider = torch.nn.functional.pad(ids[row], (0, 2))
    more = {name: x[row] if x.dim() == 1 else torch.nn.functional.pad(x[row], (0, 2)) for name, x in events.items()}
    alone = model(LENGTHS[row], wider, past_events=more)
    torch.testing.assert_close(alone[:, : ids.shape[1]], states[row], rtol=1e-4, atol=1e-5)


def the_future_changes_nothing(model, ids, events, states) -> None:
    """Another item and rating at the last position of a row; times stay, as HSTU may know the next one."""
    last = int(LENGTHS[0]) - 1
    ids, events = ids.clone(), {name: x.clone() for name, x in events.items()}
    ids[0, last] = ids[0, last] % 20 + 1
    events["ratings"][0, last] = events["ratings"][0, last] % 5 + 1
    changed = model(LENGTHS, ids, past_events=events)
    torch.testing.assert_close(changed[0, :last], states[0, :last], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed[0, last], states[0, last], atol=1e-4)


def the_past_matters(model, ids, events, states) -> None:
    ids = ids.clone()
    ids[0, 0] = ids[0, 0] % 20 + 1
    changed = model(LENGTHS, ids, past_events=events)
    assert (changed[0, : int(LENGTHS[0])] - states[0, : int(LENGTHS[0])]).abs().amax(1).min() > 0
    torch.testing.assert_close(changed[1:], states[1:])


def scores_are_those_of_the_similarity(model, queries) -> None:
    items, users = model.items.all_item_embeddings(), torch.ones(len(queries), dtype=torch.int64)
    expected, _ = model.similarity.score(queries, items, users)
    torch.testing.assert_close(model.score(Queries(queries, users), model.catalogue()), expected)
    assert items.shape == (20, model.items.embedding_dim)


@pytest.mark.parametrize("postprocessor", POSTPROCESSORS)
@torch.no_grad()
def test_rated_states_are_cut_to_the_width_of_items(postprocessor: str) -> None:
    model = build("SASRec", "LearnablePositionalEmbeddingRated", postprocessor, False)
    wide = torch.randn(3, model.sequence.encoder.output_dim)
    assert wide.shape[1] > model.items.embedding_dim
    states = model.sequence.postprocessor(wide)
    assert states.shape[1] == model.items.embedding_dim
    narrow = model.sequence.postprocessor(wide[:, : model.items.embedding_dim])
    torch.testing.assert_close(states, narrow)


@pytest.mark.parametrize("encoder", [name for name in CHOICES if "softmax" not in name and takes_attention_mask(name)])
@torch.no_grad()
def test_masked_objectives_show_encoders_both_sides(encoder: str) -> None:
    model = build(encoder, "LearnablePositionalEmbedding", "l2_norm", False)
    ids, _ = histories()
    layout = jagged_layout(LENGTHS, ids.shape[1])
    zeros = torch.zeros(layout.num_tokens, dtype=torch.int64)
    both = layout.with_attention_mask(AttentionMask(zeros, zeros))
    tokens = layout.flatten(ids)
    last = int(LENGTHS[0]) - 1
    other = tokens.clone()
    other[last] = tokens[last] % 20 + 1
    states = [model.sequence(model.embed_history(x), both, {}) for x in (tokens, other)]
    assert (states[0][:last] - states[1][:last]).abs().amax(1).min() > 0
    torch.testing.assert_close(states[0][last + 1 :], states[1][last + 1 :])


def test_every_encoder_and_objective_is_asked_to_overfit() -> None:
    assert {*ENCODERS.names()} <= {choice.get("main_module", "SASRec") for choice in EASY.values()}
    assert {*contracted(OBJECTIVES)} <= {choice.get("objective", "causal") for choice in EASY.values()}


@pytest.mark.parametrize("name", EASY)
def test_overfits_ten_users(name: str) -> None:
    """The items of ten fixed histories come out first again after a few steps; masks and a mixture of so few groups
    take more."""
    slow = {"MoL": 140, "masked": 80, "permuted": 80, "replaced": 80, "replaced, tied": 80}
    before, after = overfit(name, slow[name], 1e-2) if name in slow else overfit(name, 50, 3e-2)
    assert after == 1.0 if name in ("SASRec", "HSTU") else after > 0.65
    assert before < 0.45


def test_item_rows_of_a_step_score_like_the_model() -> None:
    model = build("TwoTower", "LearnablePositionalEmbedding", "l2_norm", False)
    ids = torch.tensor([2, 9, 17])
    leaf = ItemRows(model.items.table[ids].detach(), ids)
    rows = model.items.scored_rows(leaf, ids)
    torch.testing.assert_close(rows.weight, model.get_item_embeddings(ids))
    assert rows.ids is ids
