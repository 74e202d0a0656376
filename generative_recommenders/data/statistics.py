"""Statistics of a prepared data set: what says how far its numbers can be trusted (duplicates, ties in time, repeated
targets), and the curves of an audit (lengths, popularity, times of training and test events, every column of the
events).

All is counted in passes over the flat columns, so that memory stays that of the catalogue and the users.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from generative_recommenders.data.manifest import Manifest
from generative_recommenders.data.preparation.event_store import chunks
from generative_recommenders.data.schema import is_missing
from generative_recommenders.data.splits import Split, make_split, training_events
from generative_recommenders.data.store import SequenceDataset

IN_ORDER = 0.95
"""Share of tied neighbours in the order of their items from which on the file counts as sorted by item."""
_FEWEST_PAIRS = 10  # of fewer a share says nothing
_MOST_PAIRS = 1 << 20  # of which keys are held in memory
_USERS_OWN_ORDER = 0.8
"""Agreement of pairs that are not tied from which on users themselves take items in one order, as volumes of a
series."""
MANY_REPEATS = 0.01
QUANTILES = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
TOP_SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
SAMPLED_EVENTS = 1_000_000
"""Values of a column that its quantiles are taken from, evenly spread over the events."""
_TIME_BINS, _SHOWN_BINS = 10_000, 50


def sequence_statistics(dataset: SequenceDataset, tied: np.ndarray | None) -> dict[str, float]:
    """Counts for the manifest; targets are those of leave-one-out.

    tied: ``[E]`` bool, the event has the time of its user's previous one, to the precision of the raw file; None
    without times.
    """
    found = dict.fromkeys(("consecutive_repeats", *("duplicates", "tied_events") * (tied is not None)), 0)
    rankings = [] if tied is None else _item_rankings(dataset)
    pairs, rising = 0, [0] * len(rankings)
    tied_pairs: list[np.ndarray] = []
    untied_pairs: list[np.ndarray] = []
    for first, last in dataset.user_blocks():
        events = slice(int(dataset.offsets[first]), int(dataset.offsets[last]))
        items = dataset.items[events]
        follows = np.ones(len(items), bool)
        follows[dataset.offsets[first:last] - events.start] = False
        found["consecutive_repeats"] += int((follows[1:] & (items[1:] == items[:-1])).sum())
        if tied is None:
            continue
        ties = tied[events]
        found["tied_events"] += int(ties.sum())
        # only events of a tie can be duplicates: they are compared as numbers of (time, item)
        of_tie = ties | np.append(ties[1:], False)
        keys = np.cumsum(~ties)[of_tie] * (dataset.num_items + 1) + items[of_tie]
        found["duplicates"] += len(keys) - len(np.unique(keys))
        changes = items[1:] != items[:-1]
        second = np.flatnonzero(ties[1:] & changes) + 1
        pairs += len(second)
        for number, rank in enumerate(rankings):
            rising[number] += int((rank[items[second]] > rank[items[second - 1]]).sum())
        untied = np.flatnonzero(~ties[1:] & follows[1:] & changes) + 1
        for pairs_of, places in ((tied_pairs, second), (untied_pairs, untied)):
            pairs_of.append(_pair_keys(items, places[: _MOST_PAIRS - sum(map(len, pairs_of))]))
    split = make_split(dataset, "leave_one_out")
    names = ("test_users", "repeated_test_targets", "unseen_test_targets")
    targets = {name: split.counts[name] for name in names}
    targets["users_without_validation"] = dataset.num_users - split.counts["validation_users"]
    targets["users_without_test"] = dataset.num_users - split.counts["test_users"]
    if tied is not None:
        scored = split.test_targets >= 0
        places = dataset.offsets[:-1][scored] + split.test_targets[scored]
        targets["tied_test_targets"] = int(tied[places].sum())
    shares = [max(count, pairs - count) / pairs for count in rising if pairs >= _FEWEST_PAIRS]
    if _agreement(untied_pairs) < _USERS_OWN_ORDER:
        shares.append(_agreement(tied_pairs))
    in_order = {"tied_pairs_in_item_order": round(max(shares), 4)} if shares else {}
    return {**found, **in_order, **targets}


def _item_rankings(dataset: SequenceDataset) -> list[np.ndarray]:
    """Orders of items that a file may be sorted by, ``[V + 1]`` each: of the ids as texts, and as texts with a number,
    which ignores case."""
    ids = pl.DataFrame({"id": pl.Series(dataset.original_item_ids())})
    parts = pl.col("id").str.to_lowercase().str.extract_groups(r"^(?<head>\D*)(?<number>\d{0,18})(?<tail>.*)$")
    number = pl.col("number").cast(pl.Int64, strict=False).fill_null(-1)
    order = ids.select(parts.struct.unnest()).select(pl.arg_sort_by("head", number, "tail")).to_series()
    rank = np.zeros(dataset.num_items + 1, np.int64)
    rank[1 + order.to_numpy()] = np.arange(dataset.num_items)
    return [np.arange(dataset.num_items + 1), rank]


def _pair_keys(items: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Keys of the pairs of items at the places ``second`` and just before them, whose last bit is the order."""
    a, b = items[second - 1].astype(np.int64), items[second].astype(np.int64)
    # The pair without its order in the upper bits, so that sorted keys bring both orders of a pair together.
    return (np.minimum(a, b) << 32 | np.maximum(a, b)) * 2 + (a < b)


def _agreement(pairs: list[np.ndarray]) -> float:
    """The share of pairs seen before that come in the order in which the two mostly come: 1 where some order of all
    items rules, about half for chance; 0 where too few come again. pairs: `_pair_keys`."""
    keys, counts = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]), return_counts=True)
    _, first = np.unique(keys // 2, return_index=True)
    if not len(first):
        return 0.0
    again = np.add.reduceat(counts, first) - 1
    agree = np.maximum.reduceat(counts, first) - 1
    return float(agree.sum() / again.sum()) if again.sum() >= _FEWEST_PAIRS else 0.0


def summary(manifest: Manifest) -> str:
    """The table of counts, lengths, hashes and statistics that preparation prints."""
    rows = [f"{'':10}{'as read':>14}{'prepared':>14}"]
    for what in ("users", "items", "events"):
        rows.append(f"{what:10}{manifest.counts_before[what]:>14,}{manifest.counts[what]:>14,}")
    lengths = manifest.lengths
    rows += [
        f"users with one event (they train only): {manifest.counts['users_with_one_event']:,}",
        "events a user: min {min}, median {median:g}, mean {mean:g}, max {max}".format(**lengths),
        *statistics_lines(manifest),
        f"data hash:                 {manifest.data_hash}",
    ]
    rows += [f"{f'split hash, {name}:':26} {text}" for name, text in manifest.split_hashes.items()]
    if manifest.event_columns:
        kinds = (
            f"{each.name} ({each.kind}{f' of {each.cardinality:,}' * (each.kind == 'categorical')})"
            for each in manifest.event_columns
        )
        rows += [f"event columns: {', '.join(kinds)}", f"columns hash:              {manifest.columns_hash}"]
    return "\n".join(rows)


def statistics_lines(manifest: Manifest) -> list[str]:
    """Lines that summarise the statistics; none for folders that have none."""
    found, events = manifest.statistics, manifest.counts["events"]
    lines: list[str] = []
    if not found:
        return lines
    dropped, choice = found["dropped_duplicates"], manifest.choices["duplicates"]
    if choice != "keep":
        lines.append(f"duplicates left out before the filter: {dropped:,} (--duplicates={choice})")
    if found.get("duplicates"):
        lines.append(
            f"duplicates (same user, item and time): {_share(found['duplicates'], events)} of the events are "
            "kept; --duplicates=drop leaves them out"
        )
    if found["consecutive_repeats"]:
        lines.append(
            f"items that follow themselves: {_share(found['consecutive_repeats'], events)} of the events; "
            "--duplicates=consecutive leaves them out"
        )
    lines += tie_lines(manifest)
    lines.append(
        f"test targets of leave_one_out: {found['test_users']:,}; "
        f"{_share(found['repeated_test_targets'], found['test_users'])} are in their user's history, "
        f"{_share(found['unseen_test_targets'], found['test_users'])} in no training sequence"
    )
    lines.append(
        f"users without a validation target {found['users_without_validation']:,}, without a test target "
        f"{found['users_without_test']:,}"
    )
    if found["repeated_test_targets"] > MANY_REPEATS * found["test_users"]:
        lines.append(
            "warning: repeated targets count as misses under the seen filters history and window; "
            "where repeats are to be "
            'predicted, train and evaluate with train_fn.seen_filter = "none"'
        )
    return lines


def tie_lines(manifest: Manifest) -> list[str]:
    """Summary lines about ties in time; empty if there are none."""
    found = manifest.statistics
    if not found.get("tied_events"):
        return []
    following = manifest.counts["events"] - manifest.counts["users"]
    lines = [
        f"ties: {_share(found['tied_events'], following)} of the events share the time of their user's previous event, "
        f"and {_share(found['tied_test_targets'], found['test_users'])} of the test targets; "
        f"--tie_order={manifest.choices['tie_order']}"
    ]
    if found.get("tied_pairs_in_item_order", 0) >= IN_ORDER:
        lines.append(
            "warning: the file is sorted by item inside ties, so that the order of items gives targets away: prepare "
            "it with --tie_order=random"
        )
    return lines


def _share(count: float, total: float) -> str:
    return f"{count:,.0f} ({100 * count / max(total, 1):.1f} %)"


def length_curve(dataset: SequenceDataset) -> dict[str, Any]:
    """Quantiles of the users' lengths, and the share of users with at least 1, 2, 4, ... events."""
    lengths = dataset.lengths
    powers = 2 ** np.arange(int(np.log2(lengths.max())) + 1)
    reached = [float((lengths >= power).mean()) for power in powers]
    return {
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(lengths, QUANTILES).tolist())),
        "share_of_users_with_at_least": dict(zip(map(str, powers), reached)),
    }


def popularity_curve(dataset: SequenceDataset) -> dict[str, Any]:
    """Distribution of events over items: the share of the most popular, Gini's coefficient, and counts by rank for the
    plot."""
    counts = np.zeros(dataset.num_items + 1, np.int64)
    for part in chunks(dataset.num_events):
        counts += np.bincount(dataset.items[part], minlength=len(counts))
    counts = np.sort(counts[1:])[::-1]
    reached = np.cumsum(counts) / counts.sum()
    tops = {str(share): float(reached[max(int(share * len(counts)), 1) - 1]) for share in TOP_SHARES}
    ranks = np.unique(np.geomspace(1, len(counts), 60).astype(int))
    return {
        "share_of_events_of_the_top": tops,
        "gini": float(2 * reached.mean() - 1 - 1 / len(counts)),
        "items_with_fewer_than_5_events": int((counts < 5).sum()),
        "events_by_rank": dict(zip(map(str, ranks), counts[ranks - 1].tolist())),
    }


def timeline(dataset: SequenceDataset, split: Split) -> dict[str, Any] | None:
    """When training events and targets happened, over all users; None without times.

    Where each user's last event is the target, most users' training events are later than many users' targets: what was
    popular after a target is known to the model that is asked for it. ``training_later_than_test`` is the share of
    training events later than a test target, in the mean over the targets.
    """
    times = dataset.timestamps
    if times is None:
        return None
    low, high = int(times.min()), int(times.max())  # of bins over all, since the events are not held at once
    edges = np.linspace(low, high + 1, _TIME_BINS + 1)
    train = np.zeros(_TIME_BINS, np.int64)
    for first, last in dataset.user_blocks():
        offsets = dataset.offsets[first : last + 1]
        mask = training_events(offsets - offsets[0], split.train_stops[first:last])
        train += np.histogram(times[offsets[0] : offsets[-1]][mask], edges)[0]
    parts = {"training": train}
    for name, targets in (("validation", split.validation_targets), ("test", split.test_targets)):
        parts[name] = np.histogram(times[(dataset.offsets[:-1] + targets)[targets >= 0]], edges)[0]
    later = 1 - np.cumsum(train) / max(train.sum(), 1)  # in the later bins
    test = parts["test"]
    quantiles = {}  # as the starts of their bins
    for name, reached in ((name, np.cumsum(counts)) for name, counts in parts.items() if counts.any()):
        places = np.searchsorted(reached, np.maximum(np.array(QUANTILES) * reached[-1], 1))
        quantiles[name] = dict(zip(map(str, QUANTILES), map(_date, edges[places])))
    return {
        "quantiles": quantiles,
        "training_later_than_test": float((later * test).sum() / test.sum()) if test.any() else None,
        "bins_start": [_date(edge) for edge in edges[: -1 : _TIME_BINS // _SHOWN_BINS]],
        "events": {name: counts.reshape(_SHOWN_BINS, -1).sum(1).tolist() for name, counts in parts.items()},
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")


def event_columns(dataset: SequenceDataset) -> list[dict[str, Any]]:
    """Every column of the events beside user and item: its kind, the share that is missing, and what values it has."""
    step = max(1, dataset.num_events // SAMPLED_EVENTS)
    described = []
    for name, kind in dataset.manifest.kinds.items():
        if name == "item":
            continue
        values = np.asarray(dataset.columns[name][::step])
        there = values[~is_missing(name, values)]
        found: dict[str, Any] = {"name": name, "kind": kind, "missing": 1 - len(there) / len(values)}
        if kind == "categorical":
            counts, vocabulary = np.bincount(there, minlength=2), dataset.vocabulary(name)
            found["values"] = len(vocabulary)
            found["most_frequent"] = str(vocabulary[int(counts.argmax()) - 1]) if counts.any() else None
            found["share_of_most_frequent"] = float(counts.max() / max(len(there), 1))
        elif len(there):
            numbers = np.quantile(there, QUANTILES).tolist()
            shown = map(_date, numbers) if kind == "time" else numbers
            found["quantiles"] = dict(zip(map(str, QUANTILES), shown))
        described.append(found)
    return described
