"""Histories in the users' own ids and types are read as the model was trained on them."""

from __future__ import annotations

import datetime
import tracemalloc
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.frames import SECONDS, candidate_lists, history_frame, parsed_times
from generative_recommenders.retrieval.histories import HistoryReader

ITEMS = pa.array(["a", "b", "c"])


def read(column: str, values: list[Any], **columns: Any) -> dict[str, torch.Tensor]:
    """The batch of one user with items a, b, c, whose events have these values."""
    frame = pd.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], column: values})
    (histories,) = HistoryReader(ITEMS, None, 3, 3, **columns).read(frame, None, 9)
    return histories.batch


@pytest.mark.parametrize("needs_timestamps", [False, True])
@pytest.mark.parametrize("values", [
    [900, 1000, 80], ["900", "1000", "80"], ["900.0", "1000.0", "80.0"],
    [datetime.datetime.fromtimestamp(each, datetime.UTC) for each in (900, 1000, 80)],
    ["1970-01-01 00:15:00", "1970-01-01T00:16:40Z", "1970-01-01 01:01:20+01:00"],
])  # fmt: skip
def test_events_are_in_the_order_of_their_times_whatever_their_type(values: list[Any], needs_timestamps: bool) -> None:
    batch = read("timestamp", values, needs_timestamps=needs_timestamps)
    assert batch["item_ids"].tolist() == [[3, 1, 2]]
    if needs_timestamps:
        assert batch["timestamps"].tolist() == [[80, 900, 1000]]


@pytest.mark.parametrize("values", [
    [20230601, 20230602, 20230531], [20230601.0, 20230602.0, 20230531.0], ["20230601", "20230602", "20230531"],
    [1685577600000, 1685664000000, 1685491200000], ["1685577600000000", "1685664000000000", "1685491200000000"],
])  # fmt: skip
def test_numbers_are_the_times_that_preparation_reads_in_them(values: list[Any]) -> None:
    batch = read("timestamp", values, needs_timestamps=True)
    assert batch["item_ids"].tolist() == [[3, 1, 2]]
    assert batch["timestamps"].tolist() == [[1685491200, 1685577600, 1685664000]]


def test_numbers_between_those_of_other_forms_are_seconds() -> None:
    least, most = SECONDS
    for number, as_it_is in ((least, True), (most, True), (least - 1, False), (most + 1, False)):
        times = pl.Series([number])
        assert (parsed_times(times) is times) is as_it_is


def test_events_of_one_second_are_in_the_order_of_its_parts() -> None:
    days = [f"1970-01-01 00:01:20.{part}" for part in (3, 9, 1)]
    for values in (days, [datetime.datetime.fromisoformat(f"{day}00") for day in days], [80.3, 80.9, 80.1]):
        batch = read("timestamp", values, needs_timestamps=True)
        assert batch["item_ids"].tolist() == [[3, 1, 2]]
        assert batch["timestamps"].tolist() == [[80, 80, 80]]


@pytest.mark.parametrize("needs_timestamps", [False, True])
@pytest.mark.parametrize("values", [["900", "then", "80"], ["2023-05-31", "then", "2023-05-30"]])
def test_a_text_that_is_no_time_is_named(values: list[Any], needs_timestamps: bool) -> None:
    with pytest.raises(UserError, match="column 'timestamp': 'then' is neither a number nor a date"):
        read("timestamp", values, needs_timestamps=needs_timestamps)


def test_missing_times_come_first() -> None:
    assert read("timestamp", ["900", "", "80"])["item_ids"].tolist() == [[2, 3, 1]]


@pytest.mark.parametrize("values", [[2, 1, None], ["2", " 1", None], [2.0, 1.0, None], ["2.0", "1", ""]])
def test_categories_that_became_floats_are_known(values: list[Any]) -> None:
    column = {"name": "shelf", "kind": "categorical", "categories": ["1", "2"]}
    assert read("shelf", values, event_columns=[column])["shelf"].tolist() == [[2, 1, 0]]
    floats = {**column, "categories": ["1.0", "2", "2.0"]}  # of a file whose column is one of floats
    assert read("shelf", [1.0, 2.0, None], event_columns=[floats])["shelf"].tolist() == [[1, 3, 0]]


def test_dates_of_a_time_column_are_seconds() -> None:
    days = [datetime.date(1970, 1, day) for day in (2, 3, 4)]
    batch = read("due", days, event_columns=[{"name": "due", "kind": "time"}])
    assert batch["due"].tolist() == [[86_400, 172_800, 259_200]]


def test_users_that_became_floats_are_known() -> None:
    reader = HistoryReader(ITEMS, pa.array(["7", "8"]), 3, 3)
    assert reader.internal_users([8.0, 7.0, 9.0]).tolist() == [2, 1, 0]


def test_floats_that_may_have_been_another_id_are_unknown() -> None:
    numbers = [2**53 - 1, 2**53, 2**53 + 1]
    reader = HistoryReader(pa.array([str(each) for each in numbers]), None, 3, 3)
    assert reader.internal(numbers).tolist() == [1, 2, 3]
    assert reader.internal([float(numbers[0]), None]).tolist() == [1, 0]
    assert reader.internal([float(numbers[2]), None]).tolist() == [0, 0]  # as a float it is 2**53


def test_columns_that_nothing_reads_are_left_alone() -> None:
    for name in ("_user", "_item", "index"):
        assert read(name, [[1], [2], [3]])["item_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("values", [[[1], [2], [3]], [datetime.time(1)] * 3, [datetime.timedelta(1)] * 3])
def test_values_that_are_none_are_refused(values: list[Any]) -> None:
    for reads in ({"needs_timestamps": True}, {}):
        with pytest.raises(UserError, match="histories: timestamp holds"):
            read("timestamp", values, **reads)


@pytest.mark.parametrize("histories", [{}, {1: []}, {1: [], 2: []}])
def test_items_are_text_where_there_are_no_events(histories: dict[int, list[str]]) -> None:
    assert history_frame(histories)["item_id"].to_list() == [None] * len(histories)
    assert history_frame(histories)["item_id"].dtype == pl.String


def test_users_without_events_need_no_columns() -> None:
    columns = [
        {"name": "shelf", "kind": "categorical", "categories": ["x"]},
        {"name": "price", "kind": "numerical", "mean": 1.0, "std": 2.0},
        {"name": "sent", "kind": "time"},
    ]
    reader = HistoryReader(
        ITEMS, None, 3, 3, needs_ratings=True, needs_timestamps=True, uses_next_time=True, event_columns=columns
    )
    (histories,) = reader.read({"new": [], "other": []}, None, 9, keep_empty=True)
    assert histories.users == ["new", "other"]
    assert histories.batch["lengths"].tolist() == [0, 0]
    with pytest.raises(UserError, match="the model reads rating and timestamp and shelf"):
        next(reader.read({"new": [], "other": ["a"]}, None, 9, keep_empty=True))


def test_a_mapping_is_read_without_an_object_for_each_event() -> None:
    histories = {user: list(range(1000)) for user in range(100)}
    tracemalloc.start()
    try:
        history_frame(histories)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / 100_000 < 48  # bytes an event: three pointers; a tuple of two would be 56 more


def test_a_table_of_candidates_is_named_where_it_lacks_a_column() -> None:
    for frame in (pd.DataFrame({"item": ["a"]}), pd.DataFrame({"user_id": ["u"]})):
        with pytest.raises(UserError, match="candidates have no column 'item_id'"):
            candidate_lists(frame)
