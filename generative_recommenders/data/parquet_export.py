"""Export of a prepared data set as Parquet with original ids, for other tools or another preparation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from generative_recommenders.data.preparation.event_store import chunks
from generative_recommenders.data.preparation.folder import new_file
from generative_recommenders.data.schema import KINDS, EventColumn
from generative_recommenders.data.store import SequenceDataset


def export_parquet(dataset: SequenceDataset, path: str | Path) -> None:
    """Write a row an event: ``user``, ``item`` (strings), ``rating`` and ``timestamp`` where there are any, and the further
    columns, null where a value is missing.

    Users follow one another, oldest event first, so that preparing the file gives the same data hash.
    """
    schema = _schema(dataset)
    users, items = dataset.original_user_ids(), dataset.original_item_ids()
    with (
        new_file(Path(path)) as scratch,
        scratch.open("wb") as out,
        pq.ParquetWriter(out, schema) as writer,
    ):
        for part in chunks(dataset.num_events):
            rows = np.searchsorted(dataset.offsets, np.arange(part.start, part.stop), side="right") - 1
            columns = [users.take(pa.array(rows)), items.take(pa.array(dataset.items[part] - 1))]
            columns += [pa.chunked_array([pa.array(values[part])]) for values in _values(dataset)]
            columns += [_originals(dataset, each, part) for each in dataset.manifest.event_columns]
            writer.write_table(pa.table([c.cast(t) for c, t in zip(columns, schema.types)], schema=schema))


def _schema(dataset: SequenceDataset) -> pa.Schema:
    fields = [("user", pa.large_string()), ("item", pa.large_string())]
    fields += [("rating", pa.float32())] if dataset.ratings is not None else []
    fields += [("timestamp", pa.int64())] if dataset.timestamps is not None else []
    fields += [(each.name, KINDS[each.kind]) for each in dataset.manifest.event_columns]
    return pa.schema(fields)


def _originals(dataset: SequenceDataset, column: EventColumn, part: slice) -> pa.ChunkedArray:
    values = np.asarray(dataset.extra[column.name][part])
    if column.kind == "numerical":
        return pa.chunked_array([pa.array(values, mask=np.isnan(values))])
    if column.kind == "time":
        return pa.chunked_array([pa.array(values, mask=values == 0)])
    return dataset.vocabulary(column.name).take(pa.array(values - 1, mask=values == 0))


def _values(dataset: SequenceDataset) -> list[np.ndarray]:
    return [column for column in (dataset.ratings, dataset.timestamps) if column is not None]
