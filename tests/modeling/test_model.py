"""The encoder contract over encoders, preprocessors and postprocessors, and the recommender around them."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.hstu import HSTU
from generative_recommenders.modeling.encoders.sasrec import SASRec
from generative_recommenders.modeling.events import EventFeature, EventFeatures, next_times, token_events
from generative_recommenders.modeling.input_preprocessors import (
    CombinedItemAndRatingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor,
)
from generative_recommenders.modeling.inputs import Queries, history_inputs
from generative_recommenders.modeling.items import LocalEmbeddingModule
from generative_recommenders.modeling.model import (
    SequenceEncoder,
    SequenceRecommender,
)
from generative_recommenders.modeling.output_postprocessors import (
    L2NormEmbeddingPostprocessor,
    LayerNormEmbeddingPostprocessor,
)
from generative_recommenders.modeling.similarity.dot_product import DotProductSimilarity
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.types import SequentialFeatures

WIDTH, DIM, ITEMS = 7, 8, 20
LENGTHS = torch.tensor([1, 3, 0, 7, 5])
ENCODERS = {
    "SASRec": lambda dim, width: SASRec(dim, num_heads=2),
    "SASRec-replay": lambda dim, width: SASRec(dim, num_heads=2, norm_weights=True, final_norm=True),
    "HSTU": lambda dim, width: HSTU(dim, width, num_heads=2, dqk=3, dv=4),
    "HSTU-concat": lambda dim, width: HSTU(dim, width, num_heads=1, dqk=4, dv=4, concat_ua=True),
}
PREPROCESSORS = {
    "positions": lambda: LearnablePositionalEmbeddingInputFeaturesPreprocessor(WIDTH, DIM, 0.1),
    "rated": lambda: LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor(WIDTH, DIM, 0.1, 2, 6),
    "combined": lambda: CombinedItemAndRatingInputFeaturesPreprocessor(WIDTH, DIM, 0.1, 6),
}
POSTPROCESSORS = {"l2": L2NormEmbeddingPostprocessor, "layer": LayerNormEmbeddingPostprocessor}


def build(encoder: str, preprocessor: str, postprocessor: str) -> SequenceRecommender:
    torch.manual_seed(0)
    before = PREPROCESSORS[preprocessor]()
    width = 2 * WIDTH if preprocessor == "combined" else WIDTH
    inside = ENCODERS[encoder](before.embedding_dim, width)
    sequence = SequenceEncoder(before, inside, POSTPROCESSORS[postprocessor]())
    model = SequenceRecommender(LocalEmbeddingModule(ITEMS, DIM), sequence, DotProductSimilarity())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias.time" in name or "items.table" in name:
                parameter.normal_()
    return model.eval()


def history(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(WIDTH) < LENGTHS[:, None]
    ids = torch.randint(1, ITEMS + 1, real.shape, generator=generator) * real
    ratings = torch.randint(1, 6, real.shape, generator=generator) * real
    times = torch.randint(1, 10**5, real.shape, generator=generator).cumsum(1) * real
    next_time = times.amax(1) + 100
    return LENGTHS, ids, {"ratings": ratings, "timestamps": times, "next_timestamps": next_time}


@pytest.fixture(params=[(e, p, o) for e in ENCODERS for p in PREPROCESSORS for o in POSTPROCESSORS], ids="-".join)
def model(request: pytest.FixtureRequest) -> SequenceRecommender:
    return build(*request.param)


def test_contract(model: SequenceRecommender) -> None:
    lengths, ids, events = history()
    with torch.no_grad():
        padded = model(lengths, ids, None, events)
        check_padding(model, padded)
        check_jagged(model, padded)
        check_causality(model, padded)


def check_padding(model: SequenceRecommender, padded: torch.Tensor) -> None:
    """Padding is 0 and without influence; a wider rectangle changes nothing."""
    lengths, ids, events = history()
    real = torch.arange(WIDTH) < lengths[:, None]
    assert (padded[~real] == 0).all()
    assert (padded[real] != 0).any(1).all()
    garbage = {name: x.where(real, 3) if x.dim() == 2 else x for name, x in events.items()}
    torch.testing.assert_close(model(lengths, ids.where(real, 9), None, garbage), padded)
    cut = {name: x[:2, :3] if x.dim() == 2 else x[:2] for name, x in events.items()}
    torch.testing.assert_close(model(lengths[:2], ids[:2, :3], None, cut), padded[:2, :3])


def check_jagged(model: SequenceRecommender, padded: torch.Tensor) -> None:
    """The jagged entrance, the last states and the given embeddings are the same numbers."""
    lengths, ids, events = history()
    layout = jagged_layout(lengths, WIDTH)
    states = model.states(history_inputs(SequentialFeatures(lengths, ids, events)))
    torch.testing.assert_close(layout.to_rectangle(states), padded)
    last = padded[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)]
    torch.testing.assert_close(model.encode_query(SequentialFeatures(lengths, ids, events)).states, last)
    embeddings = model.embed_history(ids)
    torch.testing.assert_close(model(lengths, ids, embeddings, events), padded)


def check_causality(model: SequenceRecommender, padded: torch.Tensor) -> None:
    """A changed event changes its own state and none before; times are fixed, HSTU may use the next."""
    lengths, ids, events = history()
    row, place = 3, 4
    ids[row, place] = ids[row, place] % ITEMS + 1
    events["ratings"][row, place] = events["ratings"][row, place] % 5 + 1
    changed = model(lengths, ids, None, events)
    torch.testing.assert_close(changed[row, :place], padded[row, :place])
    assert not torch.allclose(changed[row, place], padded[row, place])
    others = torch.arange(len(lengths)) != row
    torch.testing.assert_close(changed[others], padded[others])


def test_gradients_of_the_two_entrances_agree(model: SequenceRecommender) -> None:
    lengths, ids, events = history()
    layout = jagged_layout(lengths, WIDTH)
    features = SequentialFeatures(lengths, ids, events)
    gradients = []
    cotangent = None
    for entrance in ("padded", "jagged"):
        model.zero_grad()
        if entrance == "padded":
            out = model(lengths, ids, None, events)
        else:
            out = layout.to_rectangle(model.states(history_inputs(features)))
        cotangent = torch.randn_like(out) if cotangent is None else cotangent
        (out * cotangent).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_loaded_it_gives_the_same(encoder: str) -> None:
    one, other = build(encoder, "positions", "l2"), build(encoder, "positions", "l2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(one.state_dict())
    lengths, ids, events = history()
    assert torch.equal(
        one.encode_query(SequentialFeatures(lengths, ids, events)).states,
        other.encode_query(SequentialFeatures(lengths, ids, events)).states,
    )


@pytest.mark.parametrize("encoder", ["SASRec", "HSTU"])
def test_overfits_ten_users(encoder: str) -> None:
    model = build(encoder, "positions", "l2")  # in evaluation mode: without dropout
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(ITEMS, generator=generator)[: WIDTH + 1] + 1 for _ in range(10)])
    lengths = torch.full((10,), WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        states = model(lengths, ids[:, :-1])
        scores = 20 * states @ torch.nn.functional.normalize(model.items.all_item_embeddings(), dim=-1).T
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten() - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    queries = model.encode_query(SequentialFeatures(lengths, ids[:, :-1], {})).states
    items = torch.nn.functional.normalize(model.items.all_item_embeddings(), dim=-1)
    best = (queries @ items.T).argmax(1) + 1
    assert (best == ids[:, -1]).all()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("preprocessor", ["positions", "combined"])
def test_a_batch_without_events(encoder: str, preprocessor: str) -> None:
    model = build(encoder, preprocessor, "l2")
    lengths, ids = torch.tensor([0, 0]), torch.zeros(2, 3, dtype=torch.int64)
    assert (model(lengths, ids, None, {"ratings": ids}) == 0).all()
    assert torch.equal(
        model.encode_query(SequentialFeatures(lengths, ids, {"ratings": ids})).states, torch.zeros(2, DIM)
    )


@pytest.mark.parametrize("entrance", ["padded", "jagged"])
def test_histories_beyond_the_positions_are_refused(entrance: str) -> None:
    lengths, ids = torch.tensor([WIDTH + 1, 1]), torch.ones(2, WIDTH + 1, dtype=torch.int64)
    model = build("SASRec", "positions", "l2")
    with pytest.raises(UserError, match=rf"history of {WIDTH + 1} tokens, and the model has {WIDTH} positions"):
        if entrance == "padded":
            model(lengths, ids)
        else:
            model.encode_query(SequentialFeatures(lengths, ids))


@pytest.mark.parametrize("wrong", [-1, ITEMS + 1])
def test_ids_that_are_no_items_have_no_score(wrong: int) -> None:
    model = build("SASRec", "positions", "l2")
    with pytest.raises(UserError, match=rf"score: item ids reach from .*{wrong}.*, outside 0..{ITEMS}"):
        model.score(Queries(torch.zeros(2, DIM)), torch.tensor([3, wrong]))


def test_an_event_feature_that_is_not_given_is_named() -> None:
    model = build("SASRec", "positions", "l2")
    model.sequence.event_features = EventFeatures([EventFeature("category", 3)], DIM)
    with pytest.raises(ValueError, match="EventFeatures needs category"):
        model.encode_query(SequentialFeatures(torch.tensor([1]), torch.ones(1, 2, dtype=torch.int64)))


def test_next_times() -> None:
    times = torch.tensor([[10, 20, 35], [5, 9, 0], [5, 0, 0]])
    lengths = torch.tensor([3, 2, 1])
    assert next_times(times, lengths, None).tolist() == [[20, 35, 35], [9, 0, 0], [0, 0, 0]]
    known = next_times(times, lengths, torch.tensor([50, 60, 70]))
    assert [known[0].tolist(), known[1, :2].tolist(), known[2, 0].item()] == [[20, 35, 50], [9, 60], 70]


def test_token_events_follow_the_layout() -> None:
    _, _, events = history()
    layout = jagged_layout(LENGTHS, WIDTH)
    tokens = token_events({**events, "other": events["ratings"] + 1}, LENGTHS, layout)
    assert set(tokens) == {"ratings", "timestamps", "next_timestamps", "other"}
    assert torch.equal(tokens["other"], tokens["ratings"] + 1)
    assert torch.equal(layout.to_rectangle(tokens["ratings"]), events["ratings"])
    last = tokens["next_timestamps"][layout.last_tokens[LENGTHS > 0]]
    assert torch.equal(last, events["next_timestamps"][LENGTHS > 0])
    assert token_events({}, LENGTHS, layout) == {}


@pytest.mark.parametrize("postprocessor", POSTPROCESSORS)
def test_postprocessors(postprocessor: str) -> None:
    x = 5 * torch.randn(4, 3, DIM)
    out = POSTPROCESSORS[postprocessor]()(x)
    if postprocessor == "l2":
        torch.testing.assert_close(out, x / x.norm(dim=-1, keepdim=True))
    else:
        centred = x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(out, centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert (POSTPROCESSORS[postprocessor]()(torch.zeros(2, DIM)) == 0).all()


@pytest.mark.parametrize("columns", [5, 6])
def test_a_full_row_without_a_next_time_is_encoded_the_same_at_any_width(columns: int) -> None:
    model = build("HSTU", "positions", "l2")
    ids = torch.zeros(1, columns, dtype=torch.int64)
    times = torch.zeros(1, columns, dtype=torch.int64)
    ids[0, :5], times[0, :5] = torch.arange(1, 6), torch.tensor([10, 20, 10**6, 10**6, 10**7])
    lengths = torch.tensor([5])
    state, _ = model.encode_incremental(None, lengths, ids, {"timestamps": times})
    torch.testing.assert_close(
        model.encode_query(SequentialFeatures(lengths, ids, {"timestamps": times})).states, state
    )
    torch.testing.assert_close(model(lengths, ids, None, {"timestamps": times})[:, 4], state)


def test_next_times_may_be_given_for_every_position() -> None:
    layout = jagged_layout(torch.tensor([2, 1]), 2)
    events = {
        "timestamps": torch.tensor([[1, 2], [3, 0]]),
        "next_timestamps": torch.tensor([[7, 8], [9, 0]]),
    }
    assert token_events(events, torch.tensor([2, 1]), layout)["next_timestamps"].tolist() == [7, 8, 9]
