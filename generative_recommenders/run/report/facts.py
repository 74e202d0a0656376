"""Facts of a run that its report needs of the data, kept in the run's folder, so that the folder alone suffices.

::

    runs/my-run/report/
      facts.json        counts, hashes, curves of the data; the users of the examples
      users.parquet     user_id, item_id (the test target), history_length, item_events, and a rank for each method
      items.parquet     item_id, title, genres, events
      examples.parquet  histories of the examples, with the columns that a `Recommender` reads
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from generative_recommenders.config.sections import Catalogue
from generative_recommenders.data.export import event_table
from generative_recommenders.data.manifest import FeatureSpec
from generative_recommenders.data.preparation.folder import new_file, write_text
from generative_recommenders.data.splits import Split, training_counts
from generative_recommenders.data.statistics import length_curve, popularity_curve, statistics_lines, timeline
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.errors import UserError, first_line
from generative_recommenders.evaluation.ranks import Ranks

FOLDER = "report"
MOST_USERS, MOST_ITEMS, EXAMPLES = 200_000, 200_000, 5
TITLES = ["title", "name", "item_name", "product_title", "movie_title", "item_title"]
GENRES = ["genres", "genre", "categories", "category", "main_category", "class", "department", "shelves", "shelf"]
KEPT = ("name", "counts_before", "counts", "filter", "choices", "data_hash")
"""Fields of a manifest."""
RANK = "rank: "
"""Before the name of a method: the column of its ranks."""


@dataclass(frozen=True)
class Facts:
    """data: what `write_facts` says of them. users, items, examples: the tables; a rank above V is a miss. methods: the
    model, then baselines. example_users: ``user_id``, ``item_id`` of the target and ``at``, its time. num_items: V."""

    data: dict[str, Any]
    users: pl.DataFrame
    items: pl.DataFrame
    examples: pl.DataFrame
    example_users: list[dict[str, Any]]
    num_items: int

    @property
    def methods(self) -> list[str]:
        return [name.removeprefix(RANK) for name in self.users.columns if name.startswith(RANK)]

    def ranks(self, method: str) -> np.ndarray:
        """``[n]`` int64 of the kept users."""
        return self.users[RANK + method].to_numpy().astype(np.int64)


def write_facts(
    run: Path, dataset: SequenceDataset, split: Split, ranks: Mapping[str, Ranks], checkpoint: str | None = None
) -> None:
    """Writes the tables; facts.json comes last, so that it stands for all of them.

    ranks: by method, the model first. Of more than `MOST_USERS` users so many are drawn, the same ones in every run on
    these data. checkpoint: the name of the model's, None where it has none.
    """
    rng, folder = np.random.default_rng(0), run / FOLDER
    tested = next(iter(ranks.values()))[0].numpy()
    kept = np.sort(rng.choice(len(tested), min(len(tested), MOST_USERS), replace=False))
    users, targets = (column.numpy()[kept] for column in next(iter(ranks.values()))[:2])
    counts = training_counts(dataset.items, dataset.offsets, split.train_stops, dataset.num_items)
    item_ids = dataset.original_item_ids().cast(pa.large_string()).combine_chunks()
    user_ids = dataset.original_user_ids().take(pa.array(users - 1)).cast(pa.large_string())
    table = pl.DataFrame(
        {
            "user_id": pl.Series(user_ids),
            "item_id": pl.Series(item_ids.take(pa.array(targets - 1))),
            "history_length": split.test_targets[users - 1].astype(np.int32),
            "item_events": counts[targets - 1],
            **{RANK + method: columns[2].numpy()[kept].astype(np.int32) for method, columns in ranks.items()},
        }
    )
    drawn = rng.choice(len(users), min(len(users), EXAMPLES), replace=False)
    firsts = dataset.offsets[users[drawn] - 1]
    histories = [*map(slice, firsts, firsts + split.test_targets[users[drawn] - 1])]  # the events before the targets
    examples, example_users = _examples(dataset, histories, table[drawn])
    shown = np.concatenate([targets, *(dataset.items[events] for events in histories)])
    items = _items(dataset, counts, item_ids, np.unique(shown))
    manifest = dataset.manifest
    facts = {
        "version": 1,
        "checkpoint": checkpoint,
        "data": {
            **{name: getattr(manifest, name) for name in KEPT},
            "statistics": statistics_lines(manifest),
            "split": {"protocol": split.protocol, "hash": split.hash, "counts": split.counts},
            "lengths": length_curve(dataset),
            "popularity": popularity_curve(dataset),
            "timeline": timeline(dataset, split),
        },
        "users_tested": len(tested),
        "examples": example_users,
    }
    for name, frame in (("users", table), ("items", items), ("examples", examples)):
        with new_file(folder / f"{name}.parquet") as scratch:
            frame.write_parquet(scratch)
    write_text(folder / "facts.json", json.dumps(facts, ensure_ascii=False) + "\n")


def read_facts(run: Path, catalogue: Catalogue, checkpoint: str) -> Facts | None:
    """None for a run that keeps none of this checkpoint; UserError for what cannot be read. catalogue:
    ``train_fn.catalogue`` of the run."""
    folder = run / FOLDER
    if not (folder / "facts.json").is_file():
        return None
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if facts.get("checkpoint") not in (None, checkpoint):  # the run was trained on; earlier releases kept no name
            return None
        users, items, examples = (
            pl.read_parquet(folder / f"{name}.parquet") for name in ("users", "items", "examples")
        )
        data, counts = {**facts["data"], "users_tested": facts["users_tested"]}, facts["data"]["counts"]
        num_items = counts["items"] + (counts.get("unrated_items", 0) if catalogue == "all" else 0)
        return Facts(data, users, items, examples, facts["examples"], num_items)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{folder} cannot be read: {type(error).__name__}: {first_line(error)}; write it again by --mode=evaluate"
        ) from error


def _examples(
    dataset: SequenceDataset, histories: list[slice], targets: pl.DataFrame
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Histories of some users with all columns, and who they are."""
    texts = dataset.texts()
    frames, described = [], []
    for events, row in zip(histories, targets.iter_rows(named=True)):
        frame = pl.DataFrame(pl.from_arrow(event_table(dataset, texts, events)))
        frames.append(frame.rename({"user": "user_id", "item": "item_id"}))
        time = None if dataset.timestamps is None else int(dataset.timestamps[events.stop])
        described.append({"user_id": row["user_id"], "item_id": row["item_id"], "at": time})
    return pl.concat(frames), described


def _items(dataset: SequenceDataset, counts: np.ndarray, item_ids: pa.Array, shown: np.ndarray) -> pl.DataFrame:
    """Titles, genres and training events of the items that a report may show. shown: internal ids that have to be
    there."""
    popular = np.argsort(-counts, kind="stable")[:MOST_ITEMS]
    rows = np.union1d(popular, shown - 1)
    taken = pa.array(rows)
    table, specs = dataset.item_features(), dataset.feature_specs("item")
    titles = [spec for spec in specs if spec.kind in ("text", "categorical")]
    title, genre = _named(titles, TITLES, "text"), _named(specs, GENRES, "categorical_list")
    columns = {"item_id": pl.Series(item_ids.take(taken)), "events": pl.Series(counts[rows])}
    shown_title = pl.lit(None, pl.String)
    if table is not None and title is not None:
        columns["title"] = pl.Series(table[title].take(taken))
        shown_title = pl.col("title").cast(pl.String)
    shown_genres = pl.lit([], pl.List(pl.String))
    if table is not None and genre is not None:
        columns["genres"] = pl.Series(table[genre].take(taken))
        # of one where each item has one value
        shown_genres = pl.concat_list("genres").cast(pl.List(pl.String)).list.drop_nulls()
    return pl.DataFrame(columns).select("item_id", shown_title.alias("title"), shown_genres.alias("genres"), "events")


def _named(specs: list[FeatureSpec], names: list[str], kind: str) -> str | None:
    """A feature of one of these names, else the first of this kind; numbers and single-valued columns are neither."""
    usable = [spec for spec in specs if spec.kind == "text" or (spec.kind != "numerical" and spec.cardinality > 1)]
    known = {spec.name.lower(): spec.name for spec in usable}
    by_name = (known[name] for name in names if name in known)
    return next(by_name, next((spec.name for spec in usable if spec.kind == kind), None))
