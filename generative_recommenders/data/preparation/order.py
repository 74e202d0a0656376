"""Filters of events, duplicates, and the order of a user's events of one time.

``file``       events of one time keep the order of the files.
``random``     by a hash of user, item, time and occurrence (how often the same three came before): the same on every
               engine.
``published``  the HSTU authors' (Zhai et al., ICML 2024): the table sorted by time with pandas' default sort, which is
               not stable, and then grouped. numpy's sort orders ties by what the CPU can do, so it holds for this
               machine alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from generative_recommenders.data.preparation import digests
from generative_recommenders.data.preparation.event_store import Events, chunks, user_blocks
from generative_recommenders.errors import UserError

TIE_ORDERS = ("file", "published", "random")
DUPLICATES = ("keep", "drop", "consecutive")
AMAZON_LEAST = 5


@dataclass(frozen=True)
class Kept:
    """``events [E]`` bool: the rating stays. ``items [raw items]`` bool: the item is in the catalogue.
    ``table [E]`` bool: the ratings that the published preparation sorts, before it drops short users."""

    events: np.ndarray
    items: np.ndarray
    table: np.ndarray


def parse_filter(text: str) -> tuple[str, int]:
    """``none``, ``amazon_five`` or ``k_core:K`` as (name, least number of ratings)."""
    name, _, number = text.partition(":")
    if name == "k_core" and number.isdecimal() and number.isascii() and int(number) >= 1:
        return name, int(number)
    if text == "amazon_five":
        return text, AMAZON_LEAST
    if text == "none":
        return text, 1
    raise UserError(f"unknown filter {text!r}; known: none, amazon_five, k_core:K with K at least 1")


def apply_filter(events: Events, text: str, keep: np.ndarray | None = None) -> Kept:
    """The ratings and items that ``text`` (see ``parse_filter``) keeps; UserError if none is left.

    keep: ``[E]`` bool, the ratings that there are after duplicates were dropped; None for all.
    """
    name, least = parse_filter(text)
    keep = np.ones(len(events), bool) if keep is None else keep
    table, items = keep, np.ones(len(events.texts["item"]), bool)
    if name == "amazon_five":
        # Items and users are counted once, and the catalogue is fixed before short users are dropped, as in the
        # published preparation (695,762 books).
        table = _frequent(events, keep, least, "user", "item")
        items = events.counts("item", table) > 0
        keep = _frequent(events, table, least, "user")
    elif name == "k_core":
        while (table := _frequent(events, keep, least, "user", "item")).sum() < keep.sum():
            keep = table
        items = events.counts("item", keep) > 0
    if not keep.any():
        raise UserError(f"no rating is left after the filter {text}; the data has {len(events)} ratings")
    return Kept(keep, items, table)


def _frequent(events: Events, keep: np.ndarray, least: int, *names: str) -> np.ndarray:
    """``keep`` without the events of a user or item (``names``) of fewer than ``least`` kept ones; a new array."""
    enough = {name: events.counts(name, keep) >= least for name in names}
    selected = keep.copy()
    for part in chunks(len(events)):
        for name, found in enough.items():
            selected[part] &= found[events.columns[name][part]]
    return selected


def check_choices(tie_order: str, duplicates: str, has_timestamps: bool) -> None:
    """UserError for choices that are unknown or do not act on such data."""
    for flag, value, known in (("tie_order", tie_order, TIE_ORDERS), ("duplicates", duplicates, DUPLICATES)):
        if value not in known:
            raise UserError(f"unknown --{flag}={value}; known: {', '.join(known)}")
    if tie_order == "published" and duplicates != "keep":
        raise UserError(
            "--tie_order=published is the authors' preparation, which keeps duplicates: leave out "
            f"--duplicates={duplicates}"
        )
    if not has_timestamps and tie_order != "file":
        raise UserError(
            f"--tie_order={tie_order} orders events of one time, and these events have no times: leave it out"
        )
    if not has_timestamps and duplicates == "drop":
        raise UserError(
            "--duplicates=drop looks for the same user, item and time, and these events have no times; "
            "--duplicates=consecutive leaves out an item that follows itself"
        )


def user_buckets(users: np.ndarray, offsets: np.ndarray, bucket_events: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in input order, and their users: about ``bucket_events`` at a time, a user is never divided.

    users: ``[E]`` places in ``offsets [U + 1]``, -1 for an event that is left out.
    """
    # Each bucket is a pass over all rows, in their order: files of events are read from front to back, and the order of
    # ties is kept.
    for first, last in user_blocks(offsets, bucket_events):
        rows = []
        for part in chunks(len(users)):
            own = users[part]
            rows.append(np.flatnonzero((own >= first) & (own < last)) + part.start)
        inside = np.concatenate(rows)
        yield inside, users[inside]


def chronological(users: np.ndarray, times: np.ndarray | None, ties: np.ndarray | None) -> np.ndarray:
    """The order of events by user, time, ``ties``, and their present place; all ``[n]``, None is passed over."""
    keys = [key for key in (ties, times) if key is not None]
    return np.lexsort((*keys, users)) if keys else np.argsort(users, kind="stable")


def tie_hashes(users: np.ndarray, items: np.ndarray, seconds: np.ndarray, occurrence: np.ndarray) -> np.ndarray:
    """``[n]`` int64 keys of random order. users, items: uint64 `digests.id_hashes`; occurrence: from 0, among events of
    the same user, item and time."""
    words = [users, items, seconds.astype(np.int64).view(np.uint64), occurrence.astype(np.uint64)]
    return digests.chain(np.uint64(0x8CB92BA72F3D8DD7), words).view(np.int64)


def order_raw(
    events: Events, tie_order: str, duplicates: str, ticks_per_second: int, bucket_events: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What ``random`` order and the duplicates say of the raw events: ``ties [E]`` int64 keys, and ``kept [E]`` bool;
    None where the order is the file's and where all stay."""
    random = tie_order == "random"
    if not random and duplicates == "keep":
        return None, None
    ties = np.zeros(len(events), np.int64) if random else None
    kept = np.ones(len(events), bool)
    user_hashes, item_hashes = (
        digests.id_hashes(events.texts[name]) if random else np.empty(0, np.uint64) for name in ("user", "item")
    )
    offsets = np.concatenate([[0], np.cumsum(events.counts("user"))])
    timestamps = events.columns.get("timestamp")
    for rows, users in user_buckets(events.columns["user"], offsets, bucket_events):
        items = events.columns["item"][rows]
        times = None if timestamps is None else timestamps[rows]
        if times is not None and (random or duplicates == "drop"):
            same = pl.DataFrame({"user": users, "item": items, "time": times})
            place_of_same = pl.int_range(pl.len()).over("user", "item", "time")
            occurrence = same.select(place_of_same).to_series().to_numpy()
            if duplicates == "drop":
                kept[rows] = occurrence == 0
            if ties is not None:
                seconds = times // ticks_per_second
                ties[rows] = tie_hashes(user_hashes[users], item_hashes[items], seconds, occurrence)
        if duplicates == "consecutive":
            order = chronological(users, times, None if ties is None else ties[rows])
            kept[rows[order]] = _differs(users[order]) | _differs(items[order])
    return ties, kept


def published_ranks(events: Events, table: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    """The place ``[E]`` int64 of every event of the ``table [E]`` (bool) in pandas' sort by time, and what the manifest
    records of it: versions, and a hash of the order."""
    import pandas as pd

    rows = np.flatnonzero(table)
    frame = pd.DataFrame({"timestamp": np.asarray(events.columns["timestamp"])[rows]})
    order = frame.sort_values("timestamp").index.to_numpy()  # quicksort by default, which is what has to be repeated
    ranks = np.full(len(events), -1, np.int64)
    ranks[rows[order]] = np.arange(len(rows))
    digest = hashlib.sha256(np.ascontiguousarray(order, "<i8").data).hexdigest()[:32]
    return ranks, {"numpy": np.__version__, "pandas": pd.__version__, "tie_order_hash": digest}


def _differs(values: np.ndarray) -> np.ndarray:
    """``[n]`` bool: the value is not the one before it; the first one is."""
    return np.concatenate([[True], values[1:] != values[:-1]])
