"""Conversion of user-supplied tables and lists (histories, candidates, times) to arrays, and of results back."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import torch

from generative_recommenders.data.readers.times import MISSING, recognise, to_nanoseconds
from generative_recommenders.errors import UserError, first_line, not_installed

Output = Literal["pandas", "polars", "spark", "torch"]
OUTPUTS: tuple[str, ...] = get_args(Output)

MAX_NUMBER = 1 << 53
"""Largest magnitude of numbers, times among them: up to here JSON and floats hold every whole one."""

SECONDS = 22_000_102, 10**11 - 1
"""Numbers in this range are always seconds: smaller ones may be dates such as 20230531, larger ones milliseconds."""

_FIRST_TIMES = 1000
"""Times that the format of a column is recognised from."""


def is_table(given: Any) -> bool:
    """Whether this is a pandas, polars, pyarrow or Spark table."""
    tables = (pd.DataFrame, pl.DataFrame, pl.LazyFrame, pa.Table, pa.RecordBatch)
    return isinstance(given, tables) or hasattr(given, "toPandas")


def as_frame(given: Any, what: str = "histories") -> pl.DataFrame:
    """A table (see `is_table`), or whatever pandas turns into one; UserError for anything else."""
    if isinstance(given, pl.LazyFrame):
        return given.collect()
    if isinstance(given, pl.DataFrame):
        return given
    if hasattr(given, "toPandas"):  # of Spark
        given = given.toPandas()
    try:
        if isinstance(given, (pa.Table, pa.RecordBatch)):
            return pl.DataFrame(given)
        return pl.from_pandas(pd.DataFrame(given))
    except (pa.ArrowException, ValueError, TypeError) as error:
        # A column of texts and numbers, a text, a number.
        raise UserError(f"{what}: {first_line(error)}; give a table whose columns have one type each") from error


def history_frame(histories: Any, further: Iterable[str] = (), what: str = "histories") -> pl.DataFrame:
    """Histories as one row per event, with as many of the further columns as they have.

    UserError where ``user_id`` or ``item_id`` is missing as a column, a user's id is missing or given twice, or values
    are lists.
    """
    if isinstance(histories, Mapping):
        lists = {user: in_order(items, f"the history of user {user!r}") for user, items in histories.items()}
        columns = {  # a user without events is still a user
            "user_id": [user for user, items in lists.items() for _ in items or [None]],
            "item_id": [item for items in lists.values() for item in items or [None]],
        }
        frame = pl.DataFrame(columns, strict=False)
        if frame["item_id"].dtype == pl.Null:  # there is no event
            frame = frame.cast({"item_id": pl.String})
        own = frame["user_id"]
        if own.dtype == pl.String and own.n_unique() < len(lists):
            raise UserError(f"{what}: user_id has the same text twice, as 7 and '7'; give each user once")
        if any(isinstance(user, int) and user.bit_length() > 64 for user in lists):  # polars makes them null or floats
            raise _large_ids(what)
    else:
        frame = as_frame(histories, what)
    for name in ("item_id", "user_id"):
        if name not in frame.columns:
            raise UserError(f"{what} have no column {name!r}; they have: {', '.join(frame.columns)}")
    names = dict.fromkeys(["user_id", "item_id", *further])
    frame = frame.select(name for name in names if name in frame.columns)
    for column in frame:
        if column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary, pl.Time, pl.Duration):
            raise UserError(f"{what}: {column.name} holds {column.dtype}; a value is a text, a number or a date")
    if str(frame["user_id"].dtype).endswith("Int128"):  # which the tables of answers cannot hold
        raise _large_ids(what)
    if frame["user_id"].null_count():
        raise UserError(f"{what}: user_id is missing in {frame['user_id'].null_count()} rows")
    return frame.with_columns(whole_ids(frame["item_id"]))


def parsed_times(times: pl.Series) -> pl.Series:
    """Times as preparation reads them, so that they sort by time: seconds and datetimes unchanged; text, numbers such
    as 20230531 and other units as datetimes, in the format of the first values. UserError naming the first value that
    does not fit."""
    if times.dtype.is_temporal():
        return times
    is_text = times.dtype == pl.String
    form = recognise(times.drop_nulls().head(_FIRST_TIMES))
    if form is not None and form.unit != "s":
        found = to_nanoseconds(times, form).cast(pl.Datetime("ns"))
    elif is_text:
        found = times.cast(pl.Float64, strict=False)
    else:
        return times
    missing = times.str.strip_chars().is_in(MISSING) if is_text else times.cast(pl.Float64).is_nan()
    wrong = found.is_null() & times.is_not_null() & ~missing
    if wrong.any():
        raise UserError(
            f"column {times.name!r}: {times.filter(wrong)[0]!r} is neither a number nor a date like 2023-05-31 14:05"
        )
    return found


def whole_seconds(times: pl.Series) -> pl.Series:
    """Dates as seconds since 1970; numbers are such already."""
    return times.cast(pl.Datetime("us")).dt.epoch("s") if times.dtype.is_temporal() else times


def whole_ids(ids: pl.Series) -> pl.Series:
    """Float ids as integers, where all are whole: pandas turns a column of integers into floats if one is missing."""
    if not ids.dtype.is_float():
        return ids
    known = ids.fill_nan(None)
    # from MAX_NUMBER on several integers become the same float
    whole = (known == known.floor()) & (known.abs() < MAX_NUMBER)
    return known.cast(pl.Int64, strict=False) if whole.all() else ids


def as_text(ids: Any) -> pl.Series:
    """Ids as text, after `whole_ids`."""
    return whole_ids(pl.Series("ids", ids, strict=False)).cast(pl.String)


def as_numbers(values: pl.Series, kind: type[pl.DataType]) -> pl.Series:
    """Values as numbers, missing ones left missing; UserError naming the first that is not a number."""
    found = values.cast(kind, strict=False)
    wrong = values.filter(found.is_null() & values.is_not_null())
    if len(wrong):
        raise UserError(f"column {values.name!r}: {wrong[0]!r} is not a number")
    return found


def listed(values: Any, what: str) -> list[Any]:
    """Ids as a list; UserError for a text, a table or a mapping, whose elements are not ids."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, (str, bytes, Mapping)) or is_table(found) or not isinstance(found, Iterable):
        raise UserError(f"{what} must be a list of item ids, got {type(values).__name__} {str(values)[:40]!r}")
    return list(found)


def _large_ids(what: str) -> UserError:
    return UserError(f"{what}: user_id holds integers that 64 bits do not hold; give such ids as text")


def in_order(items: Any, what: str) -> list[Any]:
    """The items of a history as a list; UserError also for a set, which has no order."""
    if isinstance(items, (set, frozenset)):
        raise UserError(f"{what} is a set, which has no order: give a list of items, oldest first")
    return listed(items, what)


def user_key(user: Any) -> str:
    """A user as text, since 7 may be "7" elsewhere, or 7.0 in a pandas table."""
    return str(int(user) if isinstance(user, float) and user.is_integer() else user)


def candidate_lists(candidates: Any) -> list[Any] | dict[str, list[Any]]:
    """One list for all users, or a list for each by `user_key`.

    candidates: a list, a mapping by user, or a table ``item_id`` or ``user_id, item_id``.
    """
    if is_table(candidates):
        frame = as_frame(candidates, "candidates")
        if "user_id" not in frame.columns and "item_id" in frame.columns:
            return frame["item_id"].to_list()
        groups = history_frame(frame, what="candidates").group_by("user_id").agg("item_id")
        candidates = dict(zip(groups["user_id"].to_list(), groups["item_id"].to_list()))
    if not isinstance(candidates, Mapping):
        return listed(candidates, "candidates")
    return {user_key(user): listed(items, f"candidates of user {user!r}") for user, items in candidates.items()}


def seconds(at: Any) -> int | None:
    """A time as seconds since 1970: a datetime without a zone is UTC, numbers are read by `parsed_times`. UserError for
    anything else."""
    if isinstance(at, (datetime.datetime, np.datetime64)) and not pd.isna(at):
        stamp = pd.Timestamp(at)
        return int((stamp.tz_localize("UTC") if stamp.tz is None else stamp).timestamp())
    if at is None:
        return None
    if isinstance(at, (int, float, np.integer, np.floating)) and -MAX_NUMBER <= at <= MAX_NUMBER:
        with contextlib.suppress(UserError):  # of a time after 2200
            return int(whole_seconds(parsed_times(pl.Series("at", [at])))[0])
    raise UserError(f"at={at!r} is not a time: give seconds since 1970 or a datetime")


def answer_frame(
    item_ids: pa.Array,
    users: list[Any],
    items: torch.Tensor,
    scores: torch.Tensor,
    numeric: bool,
    output: str = "pandas",
) -> Any:
    """One row per recommendation: ``user_id, item_id, rank, score``.

    item_ids: ``[V]`` original ids as text. users: ``[B]``. items, scores: ``[B, k]``, internal ids, 0 for none.
    numeric: whether to return item ids as numbers, if they all are.
    """
    row, column = (items > 0).nonzero(as_tuple=True)
    taken = item_ids.take(pa.array((items[row, column] - 1).numpy()))
    for kind in (pa.int64(), pa.uint64()) if numeric else ():
        with contextlib.suppress(pa.ArrowInvalid):  # some ids may not be numbers
            numbers = taken.cast(kind)
            # nor may "007" become one: 7 would be another item
            taken = numbers if numbers.cast(taken.type).equals(taken) else taken
            break
    frame = pl.DataFrame(
        {
            "user_id": pl.Series(users, strict=False).gather(row.numpy()),
            "item_id": pl.Series(pl.from_arrow(taken)),
            "rank": (column + 1).numpy(),
            "score": scores[row, column].numpy(),
        }
    )
    if output == "polars":
        return frame
    if output == "pandas":
        return frame.to_pandas()
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise not_installed("pyspark", "spark") from error
    return SparkSession.builder.getOrCreate().createDataFrame(frame.to_pandas())
