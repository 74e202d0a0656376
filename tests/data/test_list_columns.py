"""Columns of lists as rectangles."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from generative_recommenders.data.list_columns import padded


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_keep_their_last_entries_on_the_right(kind) -> None:
    column = pa.array([[9], [1, 2, 3], [], [4]], kind(pa.int32())).slice(1)
    values, mask = padded(column, (2,), 7)
    assert values.dtype == np.int64
    assert values.tolist() == [[2, 3], [7, 7], [7, 4]]
    assert mask.tolist() == [[True, True], [False, False], [False, True]]


def test_lists_of_lists_and_numbers() -> None:
    values, mask = padded(pa.array([[[1.0], [2.0, 3.0]], []]), (1, 3), -1.0)
    assert values.dtype == np.float32 and values.tolist() == [[[-1.0, 2.0, 3.0]], [[-1.0, -1.0, -1.0]]]
    assert mask.sum() == 2
    values, mask = padded(pa.array([True, False]), (), 0)
    assert values.tolist() == [True, False] and mask.all()
    assert padded(pa.array([], pa.list_(pa.int64())), (4,), 0)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("column", "shape", "words"),
    [
        (pa.array([1]), (2,), "holds int64, and its metadata say shape"),
        (pa.array([[1]]), (), "metadata name no shape"),
        (pa.array([[1], None]), (2,), "1 values are empty"),
        (pa.array([[None]], pa.list_(pa.int64())), (2,), "1 values are empty"),
        (pa.array(["a"]), (), "no numbers"),
    ],
)
def test_what_is_no_rectangle_is_refused(column: pa.Array, shape: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        padded(column, shape, 0)
