"""Filters of ratings: none, Amazon's rule of five, or a k-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from generative_recommenders.data.preparation.event_store import Events, chunks
from generative_recommenders.errors import UserError

AMAZON_LEAST = 5


@dataclass(frozen=True)
class Kept:
    """``events [E]`` bool: the rating stays. ``items [raw items]`` bool: the item is in the catalogue."""

    events: np.ndarray
    items: np.ndarray


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


def apply_filter(events: Events, text: str) -> Kept:
    """The ratings and items that ``text`` (see ``parse_filter``) keeps; UserError if none is left."""
    name, least = parse_filter(text)
    kept = _FILTERS[name](events, least)
    if not kept.events.any():
        raise UserError(f"no rating is left after the filter {text}; the data has {len(events)} ratings")
    return kept


def _keep_all(events: Events, least: int) -> Kept:
    return Kept(np.ones(len(events), bool), np.ones(len(events.item_ids), bool))


def _amazon(events: Events, least: int) -> Kept:
    """Ratings whose item and user have ``least`` ratings, both counted once; then users with ``least`` left.

    The catalogue is fixed before short users are dropped, as in the published preparation (695,762 books).
    """
    frequent_users, frequent_items = _frequent(events, None, least)
    keep = _select(events, np.ones(len(events), bool), frequent_users, frequent_items)
    catalogue = _count(events.items, keep, len(events.item_ids)) > 0
    long_users, _ = _frequent(events, keep, least)
    return Kept(_select(events, keep, long_users, catalogue), catalogue)


def _k_core(events: Events, least: int) -> Kept:
    """Drop users and items with fewer than ``least`` ratings until none is left."""
    keep = np.ones(len(events), bool)
    remaining = len(events)
    while True:
        keep = _select(events, keep, *_frequent(events, keep, least))
        before, remaining = remaining, int(keep.sum())
        if remaining == before:
            return Kept(keep, _count(events.items, keep, len(events.item_ids)) > 0)


_FILTERS: dict[str, Callable[[Events, int], Kept]] = {
    "none": _keep_all,
    "amazon_five": _amazon,
    "k_core": _k_core,
}


def _count(codes: np.ndarray, keep: np.ndarray | None, size: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for part in chunks(len(codes)):
        kept = codes[part] if keep is None else codes[part][keep[part]]
        counts += np.bincount(kept, minlength=size)
    return counts


def _frequent(events: Events, keep: np.ndarray | None, least: int) -> tuple[np.ndarray, np.ndarray]:
    users = _count(events.users, keep, len(events.user_ids)) >= least
    return users, _count(events.items, keep, len(events.item_ids)) >= least


def _select(events: Events, keep: np.ndarray, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """``keep`` where the event's user is in ``users`` and its item in ``items``; a new array."""
    selected = np.empty_like(keep)
    for part in chunks(len(events)):
        selected[part] = keep[part] & users[events.users[part]] & items[events.items[part]]
    return selected
