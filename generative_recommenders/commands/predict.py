"""Recommendations for users of a prepared data set, written to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from absl import logging

from generative_recommenders.commands.setup import Options, prepared_dataset
from generative_recommenders.data.loader import EvaluationLoader, query_histories
from generative_recommenders.data.preparation.folder import check_file, new_file
from generative_recommenders.data.splits import make_split
from generative_recommenders.data.store import SequenceDataset
from generative_recommenders.distributed.memory import keep_freed_memory
from generative_recommenders.distributed.progress import progress_bar
from generative_recommenders.errors import UserError, first_line
from generative_recommenders.retrieval.frames import answer_frame, as_text
from generative_recommenders.retrieval.histories import Histories
from generative_recommenders.retrieval.recommender import MAX_USERS, Recommender

SCHEMA = pa.schema(
    [
        ("user_id", pa.large_string()),
        ("item_id", pa.large_string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
    ]
)
FORMATS = (".parquet", ".csv", ".jsonl")


def predict(
    options: Options,
    users: str,
    history: str,
    top_k: int,
    exclude_seen: bool,
    candidates: str | None,
    output: Path,
) -> int:
    """Writes the top_k items of each user; the file appears whole or not at all.

    users: "all" or a file of user ids: text, one a line, or a .csv or .parquet with a column user_id. history: "all"
    events of a user, or "test", those before the test target. candidates: likewise a file of item ids. output:
    .parquet, .csv or .jsonl.
    """
    if options.run_dir is None:
        raise UserError("--mode=predict needs --run_dir, the folder of a trained run")
    if output.suffix not in FORMATS:
        raise UserError(f"--output={output}: the name must end in {', '.join(FORMATS)}")
    check_file(output, "--output=")
    began = time.monotonic()
    keep_freed_memory()
    recommender = Recommender.load(options.run_dir, plugins=options.plugins)
    data = recommender.settings.data
    dataset = prepared_dataset(data.dataset_name, options.data_root).with_catalogue(data.catalogue)
    dataset = _as_trained(dataset, recommender, options.run_dir)
    allowed = None
    if candidates is not None:
        allowed = recommender.allowed(_ids(candidates, "--candidates", "item_id"))
        if not len(allowed):
            raise UserError(f"--candidates={candidates} names no item that the model knows")
    stops = dataset.lengths if history == "all" else make_split(dataset, data.protocol).test_targets
    asked = _users(dataset, users, stops)
    names = dataset.original_user_ids().combine_chunks()
    with new_file(output) as scratch, writing(scratch, output.suffix) as write:
        starts = range(0, len(asked), MAX_USERS)
        for start in progress_bar(starts, len(starts), "recommendations"):
            some = asked[start : start + MAX_USERS]
            histories = _histories(dataset, names, stops, some, recommender, history)
            queries = recommender.queries(histories)
            scores, items = recommender.search.best(histories, queries, top_k, exclude_seen, allowed)
            users_of_rows = names.take(pa.array(some)).to_pylist()
            frame = answer_frame(recommender.item_ids, users_of_rows, items, scores, numeric=False, output="polars")
            write(frame.to_arrow().cast(SCHEMA))
    logging.info("recommendations for %d users in %s, after %.1f s", len(asked), output, time.monotonic() - began)
    return 0


def _as_trained(dataset: SequenceDataset, recommender: Recommender, run: str) -> SequenceDataset:
    """The data with their event columns numbered and scaled as those of training, which may have been fewer events.

    UserError where the items are others, where a column is gone, or where ratings have no embedding.
    """
    reader = recommender.reader
    if not dataset.original_item_ids().combine_chunks().cast(pa.large_string()).equals(recommender.item_ids):
        raise UserError(f"{run} was trained on other items than {dataset.folder} holds")
    trained = {each["name"]: each for each in recommender.facts.get("event_columns", ())}
    extra, described = dict(dataset.extra), []
    if missing := [name for name in reader.needed_columns if name not in dataset.columns]:
        raise UserError(
            f"{dataset.folder} has no column {missing[0]!r}, which the model reads of each event: "
            "prepare the data with it"
        )
    if reader.needs_ratings and reader.num_ratings is not None:
        assert dataset.ratings is not None
        least, most = dataset.ratings.min(), dataset.ratings.max()
        if not 0 <= least <= most < reader.num_ratings:
            raise UserError(
                f"{dataset.folder} has ratings from {least:g} to {most:g}, and the model reads those from 0 to "
                f"{reader.num_ratings - 1} that it was trained on: prepare the data with these"
            )
    for column in dataset.manifest.event_columns:
        then = trained.get(column.name)
        if then is None:
            described.append(column)
            continue
        described.append(replace(column, mean=then["mean"], std=then["std"]))
        if column.kind == "categorical":
            known = pa.array(then["categories"], pa.large_string())
            now = dataset.vocabulary(column.name).combine_chunks().cast(pa.large_string())
            if not now.equals(known):
                numbers = pc.fill_null(pc.index_in(now, value_set=known), -1).to_numpy() + 1
                extra[column.name] = np.concatenate([[0], numbers])[dataset.extra[column.name]]
    return replace(dataset, manifest=replace(dataset.manifest, event_columns=described), extra=extra)


def _histories(
    dataset: SequenceDataset,
    names: pa.Array,
    stops: np.ndarray,
    users: np.ndarray,
    recommender: Recommender,
    history: str,
) -> Histories:
    """Of users from 0, cut as the evaluation cuts them. The time of a request is that of the test target where history
    is "test", else of the last event.

    names: ``[U]`` original ids. stops: ``[U]``, events of each history.
    """
    reader = recommender.reader
    if history == "test":
        batch = EvaluationLoader(dataset, stops, reader.max_length, len(users)).batch(users)
    else:
        batch = query_histories(dataset, users, stops[users], reader.max_length)
    if recommender.known_users is not None:
        # numbered as in training, where there may have been others
        own = reader.internal_users(names.take(pa.array(users)).to_pylist())
        batch["user_ids"] = torch.from_numpy(own)
    bounds = zip(dataset.offsets[users], stops[users])
    seen = [np.unique(dataset.items[first : first + stop]).astype(np.int64) for first, stop in bounds]
    return Histories(users.tolist(), batch, seen)


def _users(dataset: SequenceDataset, wanted: str, stops: np.ndarray) -> np.ndarray:
    """Users from 0; those that the data do not have, and those without a history, are counted in warnings.

    stops: ``[U]``, events of each history.
    """
    asked = np.arange(dataset.num_users)
    if wanted != "all":
        given = pa.array(_ids(wanted, "--users", "user_id"), pa.large_string())
        known = dataset.original_user_ids().combine_chunks().cast(pa.large_string())
        places = pc.index_in(given, value_set=known)
        if places.null_count:
            logging.warning("%d users of %s are not in the data and are left out", places.null_count, wanted)
        if places.null_count == len(given):
            raise UserError(f"--users={wanted} names no user of {dataset.folder}: give ids as the data have them")
        asked = places.drop_null().to_numpy().astype(np.int64)
    read = asked[stops[asked] > 0]
    if lost := len(asked) - len(read):
        logging.warning("%d users have no test target with events before it and are left out", lost)
    return read


def _ids(path: str, flag: str, column: str) -> list[str]:
    """Ids of a text file, one a line, or of the column of a .csv or .parquet, such as this command writes; each
    once."""
    try:
        suffix = Path(path).suffix.lower()
        if suffix in (".csv", ".parquet"):
            # as text: 0307887898 is no number
            frame = pl.read_csv(path, infer_schema_length=0) if suffix == ".csv" else pl.read_parquet(path)
            if column not in frame.columns:
                raise UserError(f"{flag}={path} has no column {column!r}; it has: {', '.join(frame.columns)}")
            return as_text(frame[column]).unique(maintain_order=True).drop_nulls().to_list()
        # a line ends where it does for the programs that write such files; an id may hold other ends of Unicode, and
        # spaces around it
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{flag}={path}: cannot be read: {reason}") from error
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [*dict.fromkeys(line for line in lines if line.strip())]


@contextmanager
def writing(path: Path, suffix: str) -> Iterator[Callable[[pa.Table], None]]:
    """Yields what appends a table of `SCHEMA` to the file, in the format of a suffix."""
    if suffix == ".jsonl":
        with path.open("wb") as file:
            yield lambda table: pl.DataFrame(table).write_ndjson(file)
        return
    quoting = pyarrow.csv.WriteOptions(quoting_style="needed")
    with (
        pq.ParquetWriter(path, SCHEMA)
        if suffix == ".parquet"
        else pyarrow.csv.CSVWriter(path, SCHEMA, write_options=quoting)
    ) as writer:
        yield writer.write_table
