"""Export of a prepared data set: events by original ids as Parquet, or sequences in the text format of
`readers.exchange`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import logging

from generative_recommenders.data.preparation.event_store import chunks, user_blocks
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.readers.exchange import HEADER
from generative_recommenders.data.schema import KINDS, is_missing
from generative_recommenders.data.store import SequenceDataset

EVENTS_AT_ONCE = 1 << 20
"""Of the users whose lines are joined together: pyarrow's text has at most 2 GiB."""


def export_text(dataset: SequenceDataset, path: str | Path) -> None:
    """Write ``dataset`` to the file ``path``, through a temporary name beside it; warnings name what the format cannot
    hold."""
    with new_file(Path(path)) as scratch, scratch.open("wb") as out:
        out.write((",".join(HEADER) + "\n").encode())
        for first, last in user_blocks(dataset.offsets, EVENTS_AT_ONCE):
            out.write(_lines(dataset, first, last))
    for name, values in (("ratings", dataset.ratings), ("timestamps", dataset.timestamps)):
        if values is not None and not any(values[part].any() for part in chunks(len(values))):
            logging.warning("%s: all %s are zero; the exchange format reads that as none", path, name)
    if dataset.extra:
        logging.warning("%s: the exchange format leaves out %s", path, ", ".join(dataset.extra))
    seen = np.zeros(dataset.num_items + 1, bool)
    for part in chunks(dataset.num_events):
        seen[dataset.items[part]] = True
    if lost := dataset.num_items - np.count_nonzero(seen):
        logging.warning("%s: %d items of the catalogue have no event and are not in it", path, lost)


def _lines(dataset: SequenceDataset, first: int, last: int) -> bytes:
    """The lines of the users from ``first`` to before ``last``."""
    bounds = np.asarray(dataset.offsets[first : last + 1])
    events = slice(int(bounds[0]), int(bounds[-1]))
    zeros = np.zeros(events.stop - events.start, np.int8)
    columns = [
        pa.array(np.asarray(zeros if values is None else values[events])).cast(pa.string())
        for values in (dataset.items, dataset.ratings, dataset.timestamps)
    ]
    if dataset.ratings is not None:  # whole ones with .0, as the published files have them
        whole = pc.match_substring_regex(columns[1], r"^-?\d+$")
        columns[1] = pc.if_else(whole, pc.binary_join_element_wise(columns[1], ".0", ""), columns[1])
    offsets = pa.array(bounds - bounds[0], pa.int32())
    joined = [pc.binary_join(pa.ListArray.from_arrays(offsets, each), ",") for each in columns]
    numbers = pa.array(np.arange(first, last)).cast(pa.string())
    quoted = [pc.binary_join_element_wise('"', each, '"', "") for each in joined]
    lines = pc.binary_join_element_wise(numbers, numbers, *quoted, ",")
    return ("\n".join(lines.to_pylist()) + "\n").encode()


def export_parquet(dataset: SequenceDataset, path: str | Path) -> None:
    """Write `event_table` of all events.

    Users follow one another, oldest event first, so that preparing the file gives the same data hash.
    """
    texts = dataset.texts()
    schema = event_table(dataset, texts, slice(0, 0)).schema
    with (
        new_file(Path(path)) as scratch,
        scratch.open("wb") as out,
        pq.ParquetWriter(out, schema) as writer,
    ):
        for part in chunks(dataset.num_events):
            writer.write_table(event_table(dataset, texts, part))


def event_table(dataset: SequenceDataset, texts: Mapping[str, pa.ChunkedArray], events: slice) -> pa.Table:
    """A row an event: ``user``, ``item`` (strings), ``rating`` and ``timestamp`` where there are any, and the further
    columns, null where a value is missing. texts: of `SequenceDataset.texts`."""
    rows = np.searchsorted(dataset.offsets, np.arange(events.start, events.stop), side="right") - 1
    columns = {"user": texts["user"].take(pa.array(rows)).cast(pa.large_string())}
    for name, kind in dataset.manifest.kinds.items():
        values = np.asarray(dataset.columns[name][events])
        missing = is_missing(name, values)
        if kind == "categorical":
            column = texts[name].take(pa.array(values - 1, mask=missing))
        else:
            column = pa.array(values, mask=missing)
        columns[name] = column.cast(KINDS[kind])
    return pa.table(columns)
