"""Histories in the users' own ids as the batches that a model reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from absl import logging

from generative_recommenders.errors import UserError
from generative_recommenders.retrieval.frames import (
    as_numbers,
    as_text,
    history_frame,
    parsed_times,
    whole_ids,
    whole_seconds,
)


@dataclass(frozen=True)
class Histories:
    """Histories of some users. users: ``[B]`` as given. batch: columns as an evaluation loader has them. seen: for each
    user the internal ids of the whole history, not of the window alone. numeric: whether items were given as numbers.
    counts: for each user the events that the model can read, including those before the window."""

    users: list[Any]
    batch: dict[str, torch.Tensor]
    seen: list[np.ndarray]
    numeric: bool = False
    counts: Sequence[int] = ()


@dataclass
class HistoryReader:
    """Reads histories for one model.

    item_ids: ``[V]`` original ids as text, row i is internal id i + 1. known_users: likewise, for models that read
    users. max_length: events of the window. readable: items 1..readable can be in a window; later ones were added after
    training and are seen, but not encoded. needs_ratings, needs_timestamps: columns that the model reads;
    event_columns: further ones, as `Catalogue.facts` describes them. uses_next_time: whether the model reads the time
    of the request. num_ratings: ratings 0..num_ratings - 1 have an embedding; None: any rating is read.
    """

    item_ids: pa.Array
    known_users: pa.Array | None
    max_length: int
    readable: int
    needs_ratings: bool = False
    needs_timestamps: bool = False
    uses_next_time: bool = False
    event_columns: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    num_ratings: int | None = None

    @cached_property
    def _items(self) -> pd.Index:
        return pd.Index(self.item_ids.to_pylist(), dtype=object)

    @cached_property
    def _users(self) -> pd.Index | None:
        return None if self.known_users is None else pd.Index(self.known_users.to_pylist(), dtype=object)

    @property
    def needed_columns(self) -> list[str]:
        """Columns of an event that the model reads, except the item."""
        names = ["rating"] * self.needs_ratings + ["timestamp"] * self.needs_timestamps
        return names + [each["name"] for each in self.event_columns]

    @property
    def number_columns(self) -> list[str]:
        """`needed_columns` whose values are numbers."""
        categorical = {each["name"] for each in self.event_columns if each["kind"] == "categorical"}
        return [name for name in self.needed_columns if name not in categorical]

    def internal(self, items: Any) -> np.ndarray:
        """Internal ids ``[n]`` int64 of original ones, 0 for unknown items."""
        return _internal_ids(self._items, items)

    def internal_users(self, users: list[Any]) -> np.ndarray:
        """``[B]`` internal ids of users that the model was trained on, 0 for new ones."""
        if self._users is None:
            return np.zeros(len(users), np.int64)
        return _internal_ids(self._users, users)

    def known(self, items: list[Any], what: str = "item") -> torch.Tensor:
        """`internal` as a tensor; UserError for an unknown item."""
        ids = self.internal(items)
        if (ids == 0).any():
            unknown = items[int(np.flatnonzero(ids == 0)[0])]
            raise UserError(f"{what} {unknown!r} is not an item that the model was trained on")
        return torch.from_numpy(ids)

    def read(
        self, histories: Any, at: int | None, batch_size: int, keep_empty: bool = False, warn: bool = True
    ) -> Iterator[Histories]:
        """Batches of users. Those without an item that can be in a window are left out, unless ``keep_empty``.

        histories, at: see `Recommender.recommend`. warn: whether to log how much is left out. UserError where columns
        are missing or ids are empty.
        """
        frame = history_frame(histories, [*self.needed_columns, "timestamp"])
        missing = [name for name in self.needed_columns if name not in frame.columns]
        if missing and frame["item_id"].is_not_null().any():
            columns = ", ".join(["user_id", "item_id", *self.needed_columns])
            raise UserError(
                f"the model reads {' and '.join(missing)} of each event, and the histories have no such column: give a "
                f"table of {columns}, or to append {missing[0]}=..."
            )
        frame = frame.with_columns(pl.lit(None).alias(name) for name in missing)  # of histories without events
        numeric = frame["item_id"].dtype.is_integer()
        values = [pl.Series("_item", self.internal(frame["item_id"]))]
        values += [_event_column(frame[each["name"]], each) for each in self.event_columns]
        if "timestamp" in frame.columns:
            values.append(parsed_times(frame["timestamp"]))
        # A user is known by the row of its first event, so that users keep the order in which they are given.
        frame = frame.with_columns(values).with_row_index("_user")
        frame = frame.with_columns(pl.col("_user").min().over("user_id"))
        if "timestamp" in frame.columns:
            # Stable: events of one time keep the order in which they were given.
            frame = frame.sort("timestamp", maintain_order=True)
        known = self._with_numbers(frame.filter(pl.col("_item") > 0))
        if warn:
            self._warn(frame, known, at, keep_empty)
        if not keep_empty and self.readable < len(self.item_ids):
            known = known.filter((pl.col("_item") <= self.readable).any().over("_user"))
        known = known.sort("_user", maintain_order=True)
        users = (frame if keep_empty else known).select("_user", "user_id").unique("_user").sort("_user")
        names, of_events = users["user_id"].to_list(), known["_user"].to_numpy()
        for start in range(0, len(users), batch_size):
            some = users["_user"][start : start + batch_size].to_numpy()
            first, stop = np.searchsorted(of_events, [some[0], some[-1] + 1])
            rows = np.searchsorted(some, of_events[first:stop])
            yield self._batch(names[start : start + batch_size], rows, known[first:stop], at, numeric)

    def _with_numbers(self, known: pl.DataFrame) -> pl.DataFrame:
        """Ratings and times as numbers; UserError naming the first that is not one, or that has no embedding."""
        for name, kind in (("rating", pl.Float32), ("timestamp", pl.Int64)):
            if name not in self.needed_columns:
                continue
            values, wanted = as_numbers(whole_seconds(known[name]), kind), "a finite number"
            fits = values.is_not_null()
            if name == "rating":
                fits &= values.is_finite()
                if self.num_ratings is not None:
                    fits &= values.is_between(0, self.num_ratings, closed="left")
                    wanted = f"a number from 0 to {self.num_ratings - 1}, as the ratings that the model was trained on"
            wrong = ~fits.fill_null(False)
            if wrong.any():
                # these columns alone: a time far from now is no datetime of Python
                event = known.filter(wrong).select(name, "user_id", "item_id").row(0, named=True)
                raise UserError(
                    f"{name} {event[name]!r} of user {event['user_id']!r}, item {event['item_id']!r} is not {wanted}"
                )
            known = known.with_columns(values)
        return known

    def _warn(self, frame: pl.DataFrame, known: pl.DataFrame, at: int | None, keep_empty: bool) -> None:
        unknown = len(frame) - len(known) - frame["item_id"].null_count()
        if unknown:
            logging.warning("%d events of items that the model does not know are dropped", unknown)
        read = known if self.readable == len(self.item_ids) else known.filter(pl.col("_item") <= self.readable)
        lost = frame["_user"].n_unique() - read["_user"].n_unique()
        if lost and not keep_empty:
            logging.warning("%d users have no item that the model can read and are left out", lost)
        unread = len(known) - len(read)
        if unread:
            logging.warning("%d events of items that were added after training are seen, not read", unread)
        if self.uses_next_time and at is None and len(known):
            logging.warning("the time of the request is not given (at=): the time of each user's last event is taken")

    def _batch(
        self, users: list[Any], rows: np.ndarray, events: pl.DataFrame, at: int | None, numeric: bool
    ) -> Histories:
        """Columns of the last events of each user, right-padded to the window. rows: of the events, rising."""
        items = events["_item"].to_numpy()
        places = np.flatnonzero(items <= self.readable)
        counts = np.bincount(rows[places], minlength=len(users))
        windows = np.minimum(counts, self.max_length)
        column = np.arange(len(places)) - (np.cumsum(counts) - windows)[rows[places]]
        places, column = places[column >= 0], column[column >= 0]
        sources: dict[str, tuple[str, type]] = {"item_ids": ("_item", np.int64)}
        if self.needs_ratings:
            sources["ratings"] = ("rating", np.float32)
        if self.needs_timestamps:
            sources["timestamps"] = ("timestamp", np.int64)
        for each in self.event_columns:
            sources[each["name"]] = (each["name"], np.int64 if each["kind"] != "numerical" else np.float32)
        lengths = torch.from_numpy(windows)
        batch = {"lengths": lengths, "user_ids": torch.from_numpy(self.internal_users(users))}
        for name, (source, kind) in sources.items():
            values: np.ndarray = np.zeros((len(users), self.max_length), kind)
            values[rows[places], column] = events[source].to_numpy()[places]
            batch[name] = torch.from_numpy(values)
        if self.needs_timestamps:
            last = batch["timestamps"].gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            batch["next_timestamps"] = last if at is None else torch.full_like(last, at)
        ends = np.cumsum(np.bincount(rows, minlength=len(users)))
        seen = [np.unique(each) for each in np.split(items, ends[:-1])]
        return Histories(users, batch, seen, numeric, counts.tolist())


def _internal_ids(known: pd.Index, ids: Any) -> np.ndarray:
    """Internal ids ``[n]`` int64 of original ones, 0 for unknown ones. known: as text, row i is internal id i + 1."""
    return known.get_indexer(pd.Index(as_text(ids).to_list(), dtype=object)).astype(np.int64) + 1


def _event_column(values: pl.Series, column: Mapping[str, Any]) -> pl.Series:
    """An event column as the model reads it: ids of categories, standardised numbers, seconds; 0 where missing."""
    if column["kind"] == "categorical":
        known = pa.array(column["categories"], pa.large_string())
        text = values.cast(pl.String)
        # Integers become floats where one is missing, and in JSON, which the server passes on as text. But where
        # training had the float itself as a category, it is that one.
        whole = whole_ids(values).cast(pl.String).str.replace(r"^(-?\d{1,15})\.0$", "${1}")
        texts = (each.str.strip_chars().to_arrow().cast(pa.large_string()) for each in (text, whole))
        ids = pc.coalesce(*(pc.index_in(each, value_set=known) for each in texts))
        return (pl.Series(values.name, pl.from_arrow(ids)).cast(pl.Int64) + 1).fill_null(0)
    if column["kind"] == "numerical":
        numbers = as_numbers(values, pl.Float64).fill_nan(None)
        if numbers.is_infinite().any():
            raise UserError(f"column {values.name!r} holds a number that is not finite")
        return ((numbers - column["mean"]) / (column["std"] or 1.0)).fill_null(0.0)
    return as_numbers(whole_seconds(parsed_times(values)), pl.Int64).fill_null(0)
