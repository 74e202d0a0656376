"""The recommender around an encoder: what it refuses, the columns that it reads, and the times between events."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.build.parts import build_model
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.events import EventFeature, EventFeatures, next_times, token_events
from generative_recommenders.modeling.inputs import Queries
from generative_recommenders.modeling.model import SequenceRecommender
from generative_recommenders.ops.layout import jagged_layout
from generative_recommenders.types import SequentialFeatures
from tiny_models import LENGTHS, NUM_ITEMS, catalogue, histories, settings

DIM = 8


def build(encoder: str = "SASRec") -> SequenceRecommender:
    torch.manual_seed(0)
    return build_model(settings(main_module=encoder), catalogue()).eval()


@pytest.mark.parametrize("entrance", ["padded", "jagged"])
def test_histories_beyond_the_positions_are_refused(entrance: str) -> None:
    model = build()
    width = len(model.sequence.preprocessor.position)
    lengths, ids = torch.tensor([width + 1, 1]), torch.ones(2, width + 1, dtype=torch.int64)
    with pytest.raises(UserError, match=rf"history of {width + 1} tokens, and the model has {width} positions"):
        if entrance == "padded":
            model(lengths, ids)
        else:
            model.encode_query(SequentialFeatures(lengths, ids))


@pytest.mark.parametrize("wrong", [-1, NUM_ITEMS + 1])
def test_ids_that_are_no_items_have_no_score(wrong: int) -> None:
    model = build()
    with pytest.raises(UserError, match=rf"score: item ids reach from .*{wrong}.*, outside 0..{NUM_ITEMS}"):
        model.score(Queries(torch.zeros(2, DIM)), torch.tensor([3, wrong]))


def test_an_event_feature_that_is_not_given_is_named() -> None:
    model = build()
    model.sequence.event_features = EventFeatures([EventFeature("category", 3)], DIM)
    with pytest.raises(ValueError, match="EventFeatures needs category"):
        model.encode_query(SequentialFeatures(torch.tensor([1]), torch.ones(1, 2, dtype=torch.int64)))


def test_next_times() -> None:
    times = torch.tensor([[10, 20, 35], [5, 9, 0], [5, 0, 0]])
    lengths = torch.tensor([3, 2, 1])
    assert next_times(times, lengths, None).tolist() == [[20, 35, 35], [9, 0, 0], [0, 0, 0]]
    known = next_times(times, lengths, torch.tensor([50, 60, 70]))
    assert [known[0].tolist(), known[1, :2].tolist(), known[2, 0].item()] == [[20, 35, 50], [9, 60], 70]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_next_times_of_other_dtypes(dtype: torch.dtype) -> None:
    times, known, lengths = torch.tensor([[10, 20, 35], [5, 9, 0]]), torch.tensor([50, 60]), torch.tensor([3, 2])
    expected = next_times(times, lengths, known)
    for mixed in (next_times(times.to(dtype), lengths, known), next_times(times, lengths, known.to(dtype))):
        torch.testing.assert_close(mixed, expected, check_dtype=False)
    assert torch.equal(next_times(times, lengths.int(), known), expected)


def test_next_times_of_lengths_out_of_range() -> None:
    times, known = torch.tensor([[10, 20, 35], [5, 9, 0]]), torch.tensor([50, 60])
    found = next_times(times, torch.tensor([4, -1]), known)
    assert found[:, :2].tolist() == [[20, 35], [9, 0]]


def test_token_events_follow_the_layout() -> None:
    ids, events = histories()
    layout = jagged_layout(LENGTHS, ids.shape[1])
    tokens = token_events({**events, "other": events["ratings"] + 1}, LENGTHS, layout)
    assert set(tokens) == {"ratings", "timestamps", "next_timestamps", "other"}
    assert torch.equal(tokens["other"], tokens["ratings"] + 1)
    assert torch.equal(layout.to_rectangle(tokens["ratings"]), events["ratings"])
    last = tokens["next_timestamps"][layout.last_tokens[LENGTHS > 0]]
    assert torch.equal(last, events["next_timestamps"][LENGTHS > 0])
    assert token_events({}, LENGTHS, layout) == {}


@pytest.mark.parametrize("columns", [5, 6])
def test_a_full_row_without_a_next_time_is_encoded_the_same_at_any_width(columns: int) -> None:
    model = build("HSTU")
    with torch.no_grad():
        for block in model.sequence.encoder.blocks:
            block.bias.time.normal_()
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
