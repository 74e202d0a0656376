"""Filters of ratings: none, Amazon's rule of five, or a k-core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.preparation.event_store import Events, chunks
from generative_recommenders.errors import UserError

AMAZON_LEAST = 5


@dataclass(frozen=True)
class Kept:
    """``events [E]`` bool: the rating stays. ``items [raw items]`` bool: the item is in the catalogue. ``table [E]`` bool: the
    ratings that the published preparation sorts, before it drops short users."""

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
        # Items and users are counted once, and the catalogue is fixed before short users are dropped, as in the published
        # preparation (695,762 books).
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
