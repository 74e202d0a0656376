"""Evaluation protocols: which events of a user are for training, and which are validation and test targets.

``leave_one_out``  the last event is the test target, the one before it the validation target, the rest
                   trains; users with fewer than three events train only.
``paper``          all but the last event trains, the last is the test target, nothing validates: the way the
                   public code of HSTU (Zhai et al., ICML 2024) computes its tables. Users with one event
                   train only.
``global_time``    cuts c1 and c2 at the 0.8 and 0.9 quantiles of all timestamps (the smallest timestamp that
                   at least that share of all events does not exceed). Events with time <= c1 train; the
                   validation target is a user's first event after c1 if its time is <= c2; the test target is
                   the user's first event after c2. A target that is the user's very first event has no
                   history to predict from and is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from generative_recommenders.config.sections import Protocol
from generative_recommenders.data.preparation.digests import split_hash
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError

PROTOCOLS: tuple[str, ...] = get_args(Protocol)
_CUT_TENTHS = (8, 9)


@dataclass(frozen=True)
class Split:
    """Positions inside each user's sequence; all ``[U]``.

    train_stops: int32; events [0, stop) train. validation_targets, test_targets: int32 position of the
    target, -1 for none; the history is what lies before it. unseen_validation_targets, unseen_test_targets:
    bool, the target's item occurs in no user's training events (it is scored, and counts as a miss). counts:
    users and events in each part; ``short_users`` have no target (they train only); ``users_without_history``
    lost one for want of a history; ``repeated_test_targets`` are in their user's history.
    """

    protocol: str
    train_stops: np.ndarray
    validation_targets: np.ndarray
    test_targets: np.ndarray
    unseen_validation_targets: np.ndarray
    unseen_test_targets: np.ndarray
    hash: str
    counts: dict[str, int]


def make_split(dataset: SequenceDataset, protocol: str = "leave_one_out") -> Split:
    """The split of ``dataset`` under ``protocol``; UserError for an unknown one or for missing timestamps."""
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    stops, validation, test = _targets(dataset, protocol)
    without_history = (validation == 0) | (test == 0)
    validation, test = (np.where(targets > 0, targets, -1) for targets in (validation, test))
    seen = np.zeros(dataset.num_items + 1, bool)
    seen[dataset.items[training_events(dataset.offsets, stops)]] = True
    unseen_validation, unseen_test = (
        (targets >= 0) & ~seen[dataset.items[dataset.offsets[:-1] + np.maximum(targets, 0)]]
        for targets in (validation, test)
    )
    return Split(
        protocol=protocol,
        train_stops=stops.astype(np.int32),
        validation_targets=validation.astype(np.int32),
        test_targets=test.astype(np.int32),
        unseen_validation_targets=unseen_validation,
        unseen_test_targets=unseen_test,
        hash=split_hash(dataset.manifest.data_hash, protocol),
        counts={
            "train_users": int((stops > 0).sum()),
            "train_events": int(stops.sum()),
            "validation_users": int((validation >= 0).sum()),
            "test_users": int((test >= 0).sum()),
            "short_users": int(((validation < 0) & (test < 0)).sum()),
            "users_without_history": int(without_history.sum()),
            "unseen_validation_targets": int(unseen_validation.sum()),
            "unseen_test_targets": int(unseen_test.sum()),
            "repeated_test_targets": _count_repeated(dataset, test),
        },
    )


def _targets(dataset: SequenceDataset, protocol: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where training stops, and validation and test targets (-1 for none), all ``[U]``."""
    lengths = dataset.lengths
    if protocol == "global_time":
        if dataset.timestamps is None:
            raise UserError(f"{dataset.folder}: protocol global_time needs timestamps, and this data set has none")
        # In integers, as 0.8 is no binary fraction: the place, from 0, up to which at least that share of all events
        # lies.
        ranks = [-(-len(dataset.timestamps) * tenths // 10) - 1 for tenths in _CUT_TENTHS]
        ordered = np.partition(dataset.timestamps, ranks)
        # Times rise within a user, and every user has an event: the events up to a cut are a prefix of each sequence.
        stops, test = (
            np.add.reduceat(dataset.timestamps <= ordered[rank], dataset.offsets[:-1], dtype=np.int64) for rank in ranks
        )
        return stops, np.where(stops < test, stops, -1), np.where(test < lengths, test, -1)
    held_out = 2 if protocol == "leave_one_out" else 1
    scored = lengths > held_out
    validation = np.where(scored & (held_out == 2), lengths - 2, -1)
    return np.where(scored, lengths - held_out, lengths), validation, np.where(scored, lengths - 1, -1)


def _count_repeated(dataset: SequenceDataset, targets: np.ndarray) -> int:
    """Targets whose item the user had before."""
    repeated = 0
    for first, last in dataset.user_blocks():
        offsets = dataset.offsets[first : last + 1]
        items, lengths = dataset.items[offsets[0] : offsets[-1]], np.diff(offsets)
        starts, places = offsets[:-1] - offsets[0], np.maximum(targets[first:last], 0)
        same = items == np.repeat(items[starts + places], lengths)
        same &= np.arange(len(items)) < np.repeat(starts + places, lengths)
        repeated += int(np.logical_or.reduceat(same, starts).sum())
    return repeated


def training_events(offsets: np.ndarray, train_stops: np.ndarray) -> np.ndarray:
    """``[E]`` bool: events ``[offsets[u], offsets[u] + train_stops[u])`` of each user u.

    offsets: int64 ``[U + 1]``; train_stops: int ``[U]``, at most the user's number of events.
    """
    lengths = np.diff(offsets)
    if len(train_stops) != len(lengths) or (train_stops > lengths).any():
        raise UserError("train_stops: needs one value a user, at most the user's number of events; remake the split")
    # Running counts of users whose training has begun and not ended, 0 or 1: a byte an event, whatever the size.
    running = np.zeros(offsets[-1] + 1, np.int8)
    np.add.at(running, offsets[:-1], 1)
    np.subtract.at(running, offsets[:-1] + train_stops, 1)
    return np.cumsum(running[:-1], dtype=np.int8).astype(bool)


def training_counts(items: np.ndarray, offsets: np.ndarray, train_stops: np.ndarray, num_items: int) -> np.ndarray:
    """``[V]`` int64 training events of item i + 1. items: int ``[E]``, ids 1..V; the rest as in `training_events`."""
    return np.bincount(items[training_events(offsets, train_stops)], minlength=num_items + 1)[1:]
