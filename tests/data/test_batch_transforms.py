"""Histories and targets of the loader's columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.data.batch_transforms import next_token_batch
from generative_recommenders.errors import UserError

ragged = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def histories(lengths: list[int], width: int, seed: int = 0) -> dict[str, Tensor]:
    """A loader's batch: random ids, ratings and increasing times, zeros past each row's length."""
    generator = torch.Generator().manual_seed(seed)
    shape, counts = (len(lengths), width), torch.tensor(lengths)
    real = torch.arange(width) < counts[:, None]
    return {
        "user_ids": torch.arange(len(lengths)) + 100,
        "lengths": counts,
        "item_ids": torch.randint(1, 50, shape, generator=generator) * real,
        "ratings": torch.randint(1, 6, shape, generator=generator) * real,
        "timestamps": (torch.randint(1, 9, shape, generator=generator).cumsum(1) + 1000) * real,
    }


def test_the_callers_batch_is_left_alone():
    batch = histories([0, 1, 4, 6], 6) | {"other": torch.ones(4)}
    before = {name: value.clone() for name, value in batch.items()}
    after = next_token_batch(batch)
    assert after is not batch and list(batch) == list(before)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert torch.equal(after["other"], before["other"])


@settings(max_examples=30, deadline=None)
@given(ragged)
def test_next_token_batch_against_lists(lengths):
    batch = histories(lengths, 9)
    after = next_token_batch(batch)
    assert after["past_ids"].shape == after["target_ids"].shape == (len(lengths), 8)
    assert "item_ids" not in after and "lengths" not in after
    for row, length in enumerate(lengths):
        past = max(length - 1, 0)
        assert after["past_lengths"][row] == past
        for column, stem in (("item_ids", "ids"), ("ratings", "ratings"), ("timestamps", "timestamps")):
            events = batch[column][row, :length].tolist()
            assert after[f"past_{stem}"][row].tolist() == events[:past] + [0] * (8 - past)
            expected = events[1:] if past else []
            assert after[f"target_{stem}"][row, : len(expected)].tolist() == expected
            assert not after[f"target_{stem}"][row, len(expected) :].any()


def test_a_rectangle_of_one_column_is_refused():
    with pytest.raises(UserError, match="'item_ids' has 1 columns"):
        next_token_batch({"lengths": torch.tensor([1]), "item_ids": torch.tensor([[1]])})


def test_names_and_next_times():
    batch = histories([0, 1, 3, 5], 5)
    after = next_token_batch(batch)
    events = {f"{side}_{stem}" for side in ("past", "target") for stem in ("ids", "ratings", "timestamps")}
    assert set(after) == {"user_ids", "past_lengths", "next_timestamps"} | events
    assert after["past_lengths"].tolist() == [0, 0, 2, 4]
    assert after["past_ids"].shape == (4, 4)
    times = batch["timestamps"]
    assert after["next_timestamps"].tolist() == [0, 0, int(times[2, 2]), int(times[3, 4])]
    assert ((after["target_ids"] != 0).sum(1) == after["past_lengths"]).all()
    assert ((after["past_ids"] != 0).sum(1) == after["past_lengths"]).all()


def test_next_token_batch_without_ratings_and_times():
    batch = {name: value for name, value in histories([2, 3], 3).items() if name in ("lengths", "item_ids")}
    after = next_token_batch(batch)
    assert set(after) == {"past_lengths", "past_ids", "target_ids"}
