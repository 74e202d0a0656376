"""Batches against a plain walk over the users: cutting, sampling, processes, resuming, prefetching."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.loader import (
    EvaluationLoader,
    LoadedBatch,
    SequenceLoader,
    cut_histories,
    prefetch,
)
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from tiny_data import tiny_dataset

COLUMNS = {"item_ids": "items", "ratings": "ratings", "timestamps": "timestamps"}


def events_of(dataset: SequenceDataset, user: int) -> dict[str, list[int]]:
    """The columns of a user's events, oldest first."""
    own = slice(int(dataset.offsets[user]), int(dataset.offsets[user + 1]))
    return {name: getattr(dataset, source)[own].tolist() for name, source in COLUMNS.items()}


def assert_rows(dataset: SequenceDataset, columns: dict[str, torch.Tensor], kept: list[list[int]], width: int) -> None:
    """Row r holds those positions of its user's sequence, right-padded with 0."""
    assert columns["lengths"].tolist() == [len(row) for row in kept]
    for row, positions in enumerate(kept):
        events = events_of(dataset, int(columns["user_ids"][row]) - 1)
        for name, values in events.items():
            expected = [values[position] for position in positions]
            assert columns[name][row].tolist() == expected + [0] * (width - len(positions))
    kinds = {name: values.dtype for name, values in columns.items()}
    assert kinds == {name: torch.float32 if name == "ratings" else torch.int64 for name in kinds}


sequences_and_cuts = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(rows=sequences_and_cuts, width=st.integers(1, 8), seed=st.integers(0, 99))
def test_cut_by_a_plain_walk(rows: list[tuple[int, int]], width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = [length for length, _ in rows]
    with tempfile.TemporaryDirectory() as folder:
        dataset = tiny_dataset(Path(folder), [[*range(1, length + 1)] for length in lengths])
        users = generator.permutation(len(rows))
        stops = np.array([min(rows[u][1], lengths[u]) for u in users])
        kept = [[*range(max(0, stop - width), stop)] for stop in stops.tolist()]
        assert_rows(dataset, cut_histories(dataset, users, stops, width), kept, width)
        keep = generator.random(int(stops.sum())) < 0.5
        pieces = np.split(keep, np.cumsum(stops)[:-1])
        kept = [np.flatnonzero(piece)[-width:].tolist() for piece in pieces]
        assert_rows(dataset, cut_histories(dataset, users, stops, width, keep), kept, width)


@pytest.mark.parametrize(
    "present", [{"ratings": False}, {"timestamps": False}, {"ratings": False, "timestamps": False}]
)
def test_absent_columns(tmp_path: Path, present: dict[str, bool]) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2, 3], [2, 1]], **present)
    loader = SequenceLoader(dataset, dataset.lengths, 5, 2, seed=0)
    columns = next(loader.epoch(0)).columns
    assert set(columns) == {"user_ids", "lengths", *COLUMNS} - set(present)
    targets = next(iter(EvaluationLoader(dataset, dataset.lengths - 1, 5, 2)))
    assert ("target_ratings" in targets) == ("ratings" not in present)
    assert ("next_timestamps" in targets) == ("timestamps" not in present)


def loader_of(dataset: SequenceDataset, batch_size: int = 8, **options) -> SequenceLoader:
    return SequenceLoader(dataset, make_split(dataset).train_stops, 10, batch_size, seed=3, **options)


def test_an_epoch_visits_every_user_once_with_the_last_events(ragged_dataset: SequenceDataset) -> None:
    stops = make_split(ragged_dataset).train_stops
    loader = loader_of(ragged_dataset)
    batches = [*loader.epoch(0)]
    assert len(batches) == len(loader) == -(-int((stops >= 2).sum()) // 8)
    assert [batch.step for batch in batches] == [*range(len(loader))]
    users = torch.cat([batch.columns["user_ids"] for batch in batches]) - 1
    assert sorted(users.tolist()) == np.flatnonzero(stops >= 2).tolist()
    for batch in batches:
        mine = stops[batch.columns["user_ids"].numpy() - 1]
        assert_rows(ragged_dataset, batch.columns, [[*range(max(0, s - 11), s)] for s in mine.tolist()], 11)


def test_windows_over_whole_histories_make_every_event_a_target_once(ragged_dataset: SequenceDataset) -> None:
    stops = make_split(ragged_dataset).train_stops
    loader = loader_of(ragged_dataset, windows="all")
    targets: dict[int, list[int]] = {}
    for batch in loader.epoch(0):
        columns = batch.columns
        for user, length, row in zip(
            columns["user_ids"].tolist(), columns["lengths"].tolist(), columns["timestamps"].tolist()
        ):
            targets.setdefault(user - 1, []).extend(row[1:length])
        assert batch.global_tokens == int((columns["lengths"] - 1).sum())
    assert any(stop > 2 * 11 for stop in stops)
    for user in np.flatnonzero(stops >= 2).tolist():
        expected = events_of(ragged_dataset, user)["timestamps"][1 : stops[user]]
        assert sorted(targets.pop(user)) == sorted(expected)
    assert not targets


def test_order_is_drawn_anew_each_epoch(ragged_dataset: SequenceDataset) -> None:
    orders = [torch.cat([b.columns["user_ids"] for b in loader_of(ragged_dataset).epoch(epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    other = SequenceLoader(ragged_dataset, make_split(ragged_dataset).train_stops, 10, 8, seed=4)
    assert not torch.equal(orders[0], torch.cat([b.columns["user_ids"] for b in other.epoch(0)]))


def union(parts: list[LoadedBatch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}


@pytest.mark.parametrize("ratio", [1.0, 0.6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_out_the_global_batch(ragged_dataset, world_size: int, ratio: float) -> None:
    whole = loader_of(ragged_dataset, 12, sampling_ratio=ratio)
    loaders = [
        loader_of(ragged_dataset, 12 // world_size, sampling_ratio=ratio, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {len(whole)}
    for expected, *parts in zip(whole.epoch(2), *(loader.epoch(2) for loader in loaders), strict=True):
        together = union(parts)
        assert all(torch.equal(together[name], values) for name, values in expected.columns.items())
        rows = [part.columns["lengths"].numel() for part in parts]
        targets = [int((part.columns["lengths"] - 1).clamp(min=0).sum()) for part in parts]
        assert [part.first_row for part in parts] == [0, *itertools.accumulate(rows)][:-1]
        assert [part.first_token for part in parts] == [0, *itertools.accumulate(targets)][:-1]
        assert {part.global_tokens for part in parts} == {sum(targets)}
        assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_resumed_at_a_step_equals_the_tail(ragged_dataset: SequenceDataset, ratio: float) -> None:
    whole = [*loader_of(ragged_dataset, sampling_ratio=ratio).epoch(1)]
    tail = [*loader_of(ragged_dataset, sampling_ratio=ratio).epoch(1, first_step=3)]
    assert [batch.step for batch in tail] == [*range(3, len(whole))]
    for one, other in zip(whole[3:], tail, strict=True):
        assert all(torch.equal(one.columns[name], other.columns[name]) for name in one.columns)
        assert (one.first_row, one.first_token, one.global_tokens) == (
            other.first_row,
            other.first_token,
            other.global_tokens,
        )


def test_sampling_keeps_a_share_in_order_drawn_anew_each_epoch(ragged_dataset: SequenceDataset) -> None:
    stops = make_split(ragged_dataset).train_stops

    def kept(epoch: int) -> dict[int, list[int]]:
        loader = SequenceLoader(ragged_dataset, stops, 50, 8, seed=3, sampling_ratio=0.7)
        rows = union([*loader.epoch(epoch)])
        times = [row[:length].tolist() for row, length in zip(rows["timestamps"], rows["lengths"].tolist())]
        return dict(zip((rows["user_ids"] - 1).tolist(), times))

    first, again, second = kept(0), kept(0), kept(1)
    assert first == again
    assert first != second
    total = sum(int(stops[user]) for user in first)
    for rows in (first, second):
        share = sum(len(times) for times in rows.values()) / total
        assert abs(share - 0.7) < 5 * (0.7 * 0.3 / total) ** 0.5
        for user, times in rows.items():
            everything = events_of(ragged_dataset, user)["timestamps"][: stops[user]]
            assert times == sorted(times)
            assert set(times) <= set(everything)


def test_sampling_is_drawn_by_epoch_and_step(ragged_dataset: SequenceDataset) -> None:
    loader = loader_of(ragged_dataset, sampling_ratio=0.7)
    drawn = {
        (epoch, step): loader.batch(np.arange(loader.users.size), epoch, step).columns["timestamps"]
        for epoch in (0, 1)
        for step in (0, 1)
    }
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(drawn[one], drawn[other])
    assert torch.equal(loader.batch(np.arange(loader.users.size), 1, 0).columns["timestamps"], drawn[1, 0])


def test_sampling_happens_before_truncation(ragged_dataset: SequenceDataset) -> None:
    """A long history is thinned first, so that more than the sampled share of the window is filled."""
    stops = make_split(ragged_dataset).train_stops
    loader = SequenceLoader(ragged_dataset, stops, 10, 8, seed=3, sampling_ratio=0.5)
    rows = union([*loader.epoch(0)])
    long = torch.from_numpy(stops[rows["user_ids"].numpy() - 1] >= 35)
    assert (rows["lengths"][long] == 11).float().mean() > 0.8


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_impossible_ratio(ragged_dataset: SequenceDataset, ratio: float) -> None:
    with pytest.raises(ValueError, match="positional_sampling_ratio"):
        loader_of(ragged_dataset, sampling_ratio=ratio)


def test_more_processes_than_rows(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path, [[1, 2, 3], [2, 1]])
    for rank, users in ((0, 0), (1, 1), (2, 1)):
        loader = SequenceLoader(dataset, dataset.lengths, 5, 1, seed=0, rank=rank, world_size=3)
        (batch,) = loader.epoch(0)
        assert batch.columns["item_ids"].shape == (users, 6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_covers_every_user_once(ragged_dataset, world_size: int, batch_size: int) -> None:
    targets = make_split(ragged_dataset).test_targets
    users: list[int] = []
    for rank in range(world_size):
        loader = EvaluationLoader(ragged_dataset, targets, 10, batch_size, rank, world_size)
        batches = [*loader]
        assert len(batches) == len(loader)
        for batch in batches:
            users += (batch["user_ids"] - 1).tolist()
    assert sorted(users) == np.flatnonzero(targets >= 0).tolist()


def test_evaluation_batches_by_a_plain_walk(ragged_dataset: SequenceDataset) -> None:
    targets = make_split(ragged_dataset).validation_targets
    for batch in EvaluationLoader(ragged_dataset, targets, 10, 16):
        users = (batch["user_ids"] - 1).tolist()
        places = targets[users].tolist()
        histories = {name: batch[name] for name in ("user_ids", "lengths", *COLUMNS)}
        assert_rows(ragged_dataset, histories, [[*range(max(0, p - 10), p)] for p in places], 10)
        events = [events_of(ragged_dataset, user) for user in users]
        assert batch["target_ids"].tolist() == [e["item_ids"][p] for e, p in zip(events, places)]
        assert batch["target_ratings"].tolist() == [e["ratings"][p] for e, p in zip(events, places)]
        assert batch["next_timestamps"].tolist() == [e["timestamps"][p] for e, p in zip(events, places)]


def test_histories_are_whole_and_jagged(ragged_dataset: SequenceDataset) -> None:
    targets = make_split(ragged_dataset).test_targets
    loader = EvaluationLoader(ragged_dataset, targets, 3, 16)
    users = np.flatnonzero(targets >= 0)[[5, 0, 9]]
    histories = loader.histories(users)
    for row, user in enumerate(users):
        for name in COLUMNS:
            expected = events_of(ragged_dataset, user)[name][: targets[user]]
            assert histories[name][histories.rows == row].tolist() == expected
    assert len(loader.histories(users[:0])["item_ids"]) == 0


def test_evaluation_of_some_users(ragged_dataset: SequenceDataset) -> None:
    targets = make_split(ragged_dataset).test_targets
    some = np.flatnonzero(targets >= 0)[3:9]
    batches = [*EvaluationLoader(ragged_dataset, targets, 3, 4, users=some)]
    users = torch.cat([batch["user_ids"] for batch in batches]) - 1
    assert users.tolist() == some.tolist()


@pytest.mark.parametrize("depth", [0, 1, 3, 64])
def test_prefetched_batches_are_the_same(depth: int) -> None:
    assert [*prefetch(iter(range(20)), depth)] == [*range(20)]
    assert [*prefetch(iter(()), depth)] == []


@pytest.mark.parametrize("depth", [0, 1, 64])
def test_prefetch_raises_where_the_error_would_have_been(depth: int) -> None:
    def failing():
        yield 1
        yield 2
        raise ZeroDivisionError("the third batch")

    batches = prefetch(failing(), depth)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="the third batch"):
        next(batches)


def test_prefetch_works_ahead_no_further_than_its_depth_and_ends_when_left() -> None:
    made: list[int] = []

    def counting():
        for number in itertools.count():
            made.append(number)
            yield number

    batches = prefetch(counting(), 3)
    assert next(batches) == 0
    batches.close()
    count = len(made)
    assert count <= 3 + 3  # in the queue, in a hand on either side, and one that close() let through
    assert len(made) == count
