"""The three protocols against a plain walk over every user's events."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generative_recommenders.data.splits import PROTOCOLS, make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError
from tiny_data import dataset_of


def prepared(folder: Path, sequences: list[list[tuple[int, int]]], timed: bool = True) -> SequenceDataset:
    """A prepared folder with the given (item, time) events of each user."""
    rows = [(f"u{user:03}", f"i{item}", time) for user, events in enumerate(sequences) for item, time in events]
    columns = dict(zip(("user", "item", "timestamp") if timed else ("user", "item"), zip(*rows)))
    return dataset_of(columns, folder / "out")


def reference(times: list[list[int]], protocol: str) -> list[tuple[int, int, int]]:
    """(train stop, validation target, test target) of each user."""
    everything = sorted(time for user in times for time in user)
    first, second = (everything[math.ceil(len(everything) * tenths / 10) - 1] for tenths in (8, 9))
    result = []
    for user in times:
        length = len(user)
        if protocol == "leave_one_out":
            result.append((length - 2, length - 2, length - 1) if length >= 3 else (length, -1, -1))
        elif protocol == "paper":
            result.append((length - 1, -1, length - 1) if length >= 2 else (length, -1, -1))
        else:
            train = [i for i, time in enumerate(user) if time <= first]
            after = [i for i, time in enumerate(user) if time > first]
            late = [i for i, time in enumerate(user) if time > second]
            validation = after[0] if after and user[after[0]] <= second and after[0] > 0 else -1
            result.append((len(train), validation, late[0] if late and late[0] > 0 else -1))
    return result


events = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(sequences=st.lists(events, min_size=1, max_size=8), protocol=st.sampled_from(PROTOCOLS))
def test_equals_the_reference(sequences: list[list[tuple[int, int]]], protocol: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepared(Path(folder), sequences)
        split = make_split(dataset, protocol)
        ordered = [sorted(user, key=lambda event: event[1]) for user in sequences]
        expected = reference([[time for _, time in user] for user in ordered], protocol)
        found = list(zip(split.train_stops.tolist(), split.validation_targets.tolist(), split.test_targets.tolist()))
        assert found == expected
        seen = {item for user, (stop, _, _) in zip(ordered, expected) for item, _ in user[:stop]}
        for position, unseen in ((1, split.unseen_validation_targets), (2, split.unseen_test_targets)):
            targets = [(user, entry[position]) for user, entry in zip(ordered, expected)]
            assert unseen.tolist() == [target >= 0 and user[target][0] not in seen for user, target in targets]
        assert split.counts["short_users"] == sum(entry[1:] == (-1, -1) for entry in expected)
        assert split.counts["train_events"] == sum(entry[0] for entry in expected)
        assert split.counts["train_users"] == sum(entry[0] > 0 for entry in expected)
        assert split.counts["validation_users"] == sum(entry[1] >= 0 for entry in expected)
        assert split.counts["test_users"] == sum(entry[2] >= 0 for entry in expected)
        assert split.counts["unseen_test_targets"] == int(split.unseen_test_targets.sum())


def test_global_time_uses_nothing_of_the_future(tmp_path: Path) -> None:
    """Ten events at times 1..10: cuts at 8 and 9, so one validation and one test target; a lone late user
    has none."""
    dataset = prepared(tmp_path, [[(1, t) for t in (1, 3, 5, 7, 9)], [(2, t) for t in (2, 4, 6, 8)], [(3, 10)]])
    split = make_split(dataset, "global_time")
    assert split.train_stops.tolist() == [4, 4, 0]
    assert split.validation_targets.tolist() == [4, -1, -1]
    assert split.test_targets.tolist() == [-1, -1, -1]
    assert split.counts["users_without_history"] == 1


def test_hash_tells_protocols_and_data_apart(tmp_path: Path) -> None:
    one = prepared(tmp_path / "1", [[(1, 1), (2, 2), (3, 3)]])
    two = prepared(tmp_path / "2", [[(1, 1), (2, 2), (3, 4)]])
    hashes = {make_split(dataset, protocol).hash for dataset in (one, two) for protocol in PROTOCOLS}
    assert len(hashes) == 6
    assert (
        make_split(one, "paper").hash == make_split(prepared(tmp_path / "3", [[(1, 1), (2, 2), (3, 3)]]), "paper").hash
    )


def test_faults(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [[(1, 1), (2, 2)]], timed=False)
    with pytest.raises(UserError, match="global_time needs timestamps"):
        make_split(dataset, "global_time")
    with pytest.raises(UserError, match="unknown protocol 'last'; known: leave_one_out, paper, global_time"):
        make_split(dataset, "last")
    assert make_split(dataset, "paper").test_targets.tolist() == [1]
